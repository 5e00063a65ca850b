"""Real text on every machine: the source of the Python standard library, byte by byte, split by file name."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

HELD_OUT_SHARE = 20  # one file in so many
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "ensurepip", "lib2to3", "__pycache__"}


def training_files() -> list[Path]:
    """The standard library's modules, without tests and without the held-out files."""
    return [file for file in _files() if not _is_held_out(file)]


def held_out_files() -> list[Path]:
    """Modules that `training_files` leaves out; the choice depends on the file's name only, on every machine."""
    return [file for file in _files() if _is_held_out(file)]


def held_out_text(size: int) -> bytes:
    """The first `size` bytes of the held-out modules."""
    return b"".join(file.read_bytes() for file in held_out_files())[:size]


def _files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    found = sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix())
    kept = [file for file in found if not _SKIPPED & set(file.relative_to(root).parts)]
    if not kept:
        raise FileNotFoundError(
            f"expected the standard library's source under {root}, got no .py file; name text files"
        )
    return kept


def _is_held_out(file: Path) -> bool:
    return hashlib.sha256(file.name.encode()).digest()[0] % HELD_OUT_SHARE == 0
