"""What holds for every test: one thread per worker, so that `pytest -n 2` does not oversubscribe two cores, and
Triton's interpreter for kernels.

Triton reads TRITON_INTERPRET when it is imported, so it is set here, before any test module: the launchers of
gdn2_ops.kernels then take CPU tensors (float32 and float16; the interpreter rounds bfloat16 wrongly). Tests that
compile kernels do it in a process of their own, under TRITON_INTERPRET=0. `make gpu-check` sets it to 0 for all.
"""

import os

import torch

os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)
