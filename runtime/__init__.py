"""Running exported files, and measuring what runs: no PyTorch, no layers, no kernels in here."""

from gdn2_ops.runtime.tensorrt_library import path as tensorrt_plugin

__all__ = ["tensorrt_plugin"]
