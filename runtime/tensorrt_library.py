"""The TensorRT plugin of the node `gdn2::GatedDeltaNet2`, in place of the node's function body.

trtexec takes `path()` as --dynamicPlugins, polygraphy as --plugins, Triton Inference Server as
--backend-config=tensorrt,plugins=, Python as `tensorrt.get_plugin_registry().load_library(str(path()))`.
"""

from __future__ import annotations

from pathlib import Path

from gdn2_ops.compiled import find_library


def path() -> Path:
    """The library's file. Raises: ImportError: it has not been built into the package."""
    return find_library("libgdn2_tensorrt.so", "build it, which needs no GPU: gdn2 build-plugin")
