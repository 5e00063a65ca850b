"""Finds and loads the compiled libraries of the package. Imports torch only."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

TORCH_LIBRARY = "libgdn2_torch.so"


def load_torch_library() -> Path:
    """Loads the operators' schemas and CPU kernels. Raises: ImportError: the package was installed without them."""
    file = find_library(TORCH_LIBRARY)
    torch.ops.load_library(file)
    return file


def find_library(name: str) -> Path:
    """The path of a compiled library. An editable install keeps it apart from the sources: every folder is searched."""
    folders = [Path(folder) / "lib" for folder in sys.modules["gdn2_ops"].__path__]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise ImportError(
        f"gdn2_ops: expected {name} in one of {[str(folder) for folder in folders]}, got none; install the package with "
        "a C++ compiler at hand: pip install --no-build-isolation ."
    )
