"""The TensorRT plugin GatedDeltaNet2 as one library: cubins built here, embedded and compiled, without a GPU.

Needs a C++ compiler, and cmake: pip install 'gdn2-ops[tensorrt]'. Nothing of NVIDIA's is linked, no header of it used.
"""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

from gdn2_ops.export.cubins import write_table
from gdn2_ops.export.kernels import Build, build_kernels

LIBRARY = "libgdn2_tensorrt.so"
SOURCES = Path(__file__).resolve().parent.parent / "runtime" / "tensorrt"


def build(output: str | Path, builds: list[Build], *, jobs: int | None = None, report=None) -> Path:
    """Compiles the kernels and the library into the folder `output`, which is made. Returns the library's path.

    The folder keeps the cubins and their manifest; the library alone is what TensorRT loads.

    Args: those of `export.kernels.build_kernels`; builds: of `export.cubins.embedded`.
    Raises: ImportError: there is no cmake. RuntimeError: the compiler refuses, with what it said; and what
        `build_kernels` raises.
    """
    cmake = _cmake()
    if not (SOURCES / "CMakeLists.txt").is_file():
        raise ImportError(f"gdn2_ops.export.plugin: expected the sources of the plugin in {str(SOURCES)!r}, got none")
    folder = Path(output).resolve()
    manifest = build_kernels(folder / "cubins", builds, jobs=jobs, report=report)
    write_table(manifest.parent)
    tree = folder / "build"
    _run([cmake, "-S", str(SOURCES), "-B", str(tree), f"-DGDN2_CUBINS={manifest.parent}", "-DCMAKE_BUILD_TYPE=Release"])
    _run([cmake, "--build", str(tree), "--parallel"])
    library = folder / LIBRARY
    shutil.copyfile(tree / LIBRARY, library)
    shutil.rmtree(tree)
    return library


def _cmake() -> str:
    found = shutil.which("cmake", path=sysconfig.get_path("scripts")) or shutil.which("cmake")
    if found is None:
        raise ImportError("gdn2_ops.export.plugin needs cmake: pip install 'gdn2-ops[tensorrt]'")
    return found


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"gdn2_ops.export.plugin: {' '.join(command[:2])} failed:\n{done.stdout}{done.stderr}")
