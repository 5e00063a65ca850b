"""Kernels of the node `gdn2::GatedDeltaNet2` for ONNX Runtime on the CPU, in place of the node's function body.

C and C++ hosts hand `path()` to RegisterCustomOpsLibrary; onnxruntime-genai names it as `custom_ops_library`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gdn2_ops.compiled import find_library

if TYPE_CHECKING:
    import onnxruntime


def path() -> Path:
    """The library's file. Raises: ImportError: the package was installed without it."""
    return find_library("libgdn2_onnxruntime.so")


def register(options: onnxruntime.SessionOptions) -> Path:
    """Registers the kernels for every session made with these options; to be called once for each options object.

    Float32, float16 and bfloat16 nodes of any T run them. `initial_state` and `final_state` may be bound to one buffer.
    An ONNX Runtime older than 1.17 gets no kernel and runs the body.

    Returns: the library's file.
    Raises: ImportError: the package was installed without it.
    """
    file = path()
    options.register_custom_ops_library(str(file))
    return file
