"""python tests/trt/headers.py FOLDER [FOLDER ...]: is runtime/tensorrt/abi.h what the headers of a TensorRT say?

FOLDER: where NvInferRuntime.h is, and others to search, as that of cuda_runtime_api.h; without one the single type that
is needed of it is declared here. Sizes, offsets, values, places in virtual tables and signatures are compared by
compiling both; the exit status is 0 when all are the same, 1 when they are not, 2 when the headers do not compile.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
CUDA = "#pragma once\ntypedef struct CUstream_st* cudaStream_t;\ntypedef struct CUevent_st* cudaEvent_t;\n"


def main(folders: list[str]) -> int:
    if not folders or not any((Path(folder) / "NvInferRuntime.h").is_file() for folder in folders):
        print(f"expected a folder with NvInferRuntime.h, got {folders}; {__doc__.splitlines()[0]}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as build:
        (Path(build) / "last").mkdir()
        (Path(build) / "last" / "cuda_runtime_api.h").write_text(CUDA)
        search = [f"-isystem{folder}" for folder in (*folders, f"{build}/last")]
        command = ["c++", "-std=c++17", "-w", *search, HERE / "headers.cpp", "-o", f"{build}/headers", "-ldl"]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode:
            print(made.stderr, file=sys.stderr)
            return 2
        done = subprocess.run([f"{build}/headers"], capture_output=True, text=True)
        print(done.stdout, end="")
        return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
