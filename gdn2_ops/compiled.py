"""Where the compiled libraries of the package are."""

from __future__ import annotations

import sys
from pathlib import Path

INSTALL = "install the package with a C++ compiler at hand: pip install --no-build-isolation ."


def find_library(name: str, way_out: str = INSTALL) -> Path:
    """The path of a compiled library. An editable install keeps it apart from the sources: every folder is searched.

    Raises: ImportError: there is none; the message ends in `way_out`.
    """
    folders = [Path(folder) / "lib" for folder in sys.modules["gdn2_ops"].__path__]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise ImportError(f"gdn2_ops: expected {name} in one of {[str(folder) for folder in folders]}, got none; {way_out}")


def library_folder() -> Path:
    """Where the compiled libraries of this installation are. Raises: ImportError: the package came without any."""
    return find_library("libgdn2_torch.so").parent
