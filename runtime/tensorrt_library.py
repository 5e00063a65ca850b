"""The TensorRT plugin of the node `gdn2::GatedDeltaNet2`, in place of the node's function body.

trtexec takes `path()` as --dynamicPlugins, polygraphy as --plugins, Triton Inference Server as
--backend-config=tensorrt,plugins=, Python as `tensorrt.get_plugin_registry().load_library(str(path()))`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gdn2_ops.compiled import find_library

LIBRARY = "libgdn2_tensorrt.so"
CREATOR = ("GatedDeltaNet2", "1", "gdn2")  # name, version, namespace


def path() -> Path:
    """The library's file. Raises: ImportError: it has not been built into the package."""
    return find_library(LIBRARY, "build it, which needs no GPU: gdn2 build-plugin")


def built() -> Path | None:
    """The library's file, or None where it has not been built."""
    try:
        return path()
    except ImportError:
        return None


def load(trt: Any, library: str | Path, log: Any) -> None:
    """Gives the library to the module `tensorrt`. Raises: RuntimeError: it refuses the library; log: what it said."""
    registry = trt.get_plugin_registry()
    if (
        registry.load_library(str(library)) is None and registry.get_creator(*CREATOR) is None
    ):  # None: it has it already
        raise RuntimeError(f"TensorRT refuses the plugin {str(library)!r}: {log.text()}")


def error_log(trt: Any) -> Any:
    """A logger for the module `tensorrt`: `text()` is its last errors."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors = [*self.errors[-9:], msg]

        def text(self) -> str:
            return "; ".join(self.errors) or "it said nothing"

    return Log()
