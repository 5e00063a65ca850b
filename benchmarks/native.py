"""C++ files of the benchmarks as loaded libraries, which the C++ compiler builds on first use."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

BUILT = Path(__file__).resolve().parent.parent / "build/bench"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC")


def load(source: Path, *, include: Sequence[Path] = (), archives: Sequence[Path] = ()) -> ctypes.CDLL:
    """Built again when the source, the compiler or an archive changes.

    Raises: RuntimeError: no C++ compiler, or it refuses the file.
    """
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise RuntimeError(f"benchmarks need a C++ compiler for {source.name}, got no {compiler!r}; set CXX")
    flags = [*FLAGS, *(f"-I{folder}" for folder in include)]
    parts = (source.read_bytes(), " ".join((compiler, *flags)).encode(), *(x.read_bytes() for x in archives))
    library = BUILT / f"{source.stem}-{hashlib.sha256(b''.join(parts)).hexdigest()[:12]}.so"
    if not library.is_file():
        BUILT.mkdir(parents=True, exist_ok=True)
        command = [compiler, *flags, str(source), *map(str, archives), "-o", str(library)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"{compiler}: {run.stderr}")
    return ctypes.CDLL(str(library))
