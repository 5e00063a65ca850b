"""Running exported files, and measuring what runs: no PyTorch, no layers, no kernels in here."""
