"""Kernels of the node `gdn2::GatedDeltaNet2` for ONNX Runtime on the CPU and on CUDA, in place of the node's body.

C and C++ hosts hand `path()` to RegisterCustomOpsLibrary; onnxruntime-genai names it as `custom_ops_library`. On CUDA
the library opens the file `cubins()`, which lies beside it; a copy of one needs a copy of the other.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gdn2_ops.compiled import find_library

if TYPE_CHECKING:
    import onnxruntime

CUBINS = "libgdn2_cubins.so"  # the name that runtime/cuda/beside.cpp opens


def path() -> Path:
    """The library's file. Raises: ImportError: the package was installed without it."""
    return find_library("libgdn2_onnxruntime.so")


def cubins() -> Path:
    """The file of the kernels for GPUs. Raises: ImportError: it has not been built into the package."""
    return find_library(CUBINS, "build it, which needs no GPU: gdn2 build-plugin --for onnxruntime")


def register(options: onnxruntime.SessionOptions) -> Path:
    """Registers the kernels for every session made with these options; to be called once for each options object.

    Float32, float16 and bfloat16 nodes of any T run them. `initial_state` and `final_state` may be bound to one buffer.
    An ONNX Runtime older than 1.17 gets no kernel and runs the body; for CUDA it has to be 1.18. A session with the
    CUDAExecutionProvider is refused where `cubins()` is missing.

    Returns: the library's file.
    Raises: ImportError: the package was installed without it.
    """
    file = path()
    options.register_custom_ops_library(str(file))
    return file
