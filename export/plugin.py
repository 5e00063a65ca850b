"""Cubins built here as one library, without a GPU: the TensorRT plugin, or what our ONNX Runtime library opens on CUDA.

Needs a C++ compiler, and cmake: pip install 'gdn2-ops[tensorrt]'. Nothing of NVIDIA's is linked, no header of it used.
"""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from gdn2_ops.export.cubins import write_table
from gdn2_ops.export.kernels import Build, build_kernels
from gdn2_ops.runtime.onnxruntime_library import CUBINS
from gdn2_ops.runtime.tensorrt_library import LIBRARY

SOURCES = Path(__file__).resolve().parent.parent / "runtime"
TARGETS = {"tensorrt": (LIBRARY, SOURCES / "tensorrt"), "onnxruntime": (CUBINS, SOURCES / "cuda")}


def build(
    output: str | Path, builds: list[Build], *, target: str = "tensorrt", jobs: int | None = None, report=None
) -> Path:
    """Compiles the kernels and the library into the folder `output`, which is made. Returns the library's path.

    The folder keeps the cubins and their manifest; the library alone is what a runtime loads.

    Args: those of `export.kernels.build_kernels`; builds: of `export.cubins.embedded`; target: of `TARGETS`: tensorrt,
        or onnxruntime, whose library is to lie beside libgdn2_onnxruntime.so.
    Raises: ImportError: there is no cmake. RuntimeError: the compiler refuses, with what it said; and what
        `build_kernels` raises.
    """
    _cmake()
    manifest = build_kernels(Path(output).resolve() / "cubins", builds, jobs=jobs, report=report)
    write_table(manifest.parent)
    return compile_library(manifest.parent, output, target)


def compile_library(cubins: Path, output: str | Path, target: str = "tensorrt") -> Path:
    """The library of a folder that `export.cubins.write_table` has completed. Args, returns, raises: as `build`."""
    name, sources = TARGETS[target]
    if not (sources / "CMakeLists.txt").is_file():
        raise ImportError(f"gdn2_ops.export.plugin: expected the sources of {name} in {str(sources)!r}, got none")
    cmake, library = _cmake(), Path(output).resolve() / name
    with tempfile.TemporaryDirectory() as tree:
        _run([cmake, "-S", str(sources), "-B", tree, f"-DGDN2_CUBINS={cubins}", "-DCMAKE_BUILD_TYPE=Release"])
        _run([cmake, "--build", tree, "--parallel"])
        shutil.copyfile(Path(tree) / name, library)
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
