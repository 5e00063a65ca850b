"""What `gdn2 build-plugin` makes for the GPU of this machine."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gdn2_ops.kernels import tiles

HEADS = (32, 64, 128)


def skip_without_gpu() -> None:
    """For fixtures that come before that of every test, which asks the same."""
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU in this machine; make gpu-check runs this on one")


def build(folder: Path, target: str) -> None:
    """Kernels of HEADS for tensorrt or onnxruntime. Skips where there is nothing to build them with."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler in this machine")
    arch = tiles.table_arch(*torch.cuda.get_device_capability())
    selection = ["--arch", str(arch), *(word for K in HEADS for word in ("--head-size", str(K)))]
    command = [sys.executable, "-m", "gdn2_ops.cli", "build-plugin", "--for", target, "-o", folder, *selection]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    if "needs cmake" in done.stderr:
        pytest.skip("cmake is not installed")
    assert done.returncode == 0, done.stderr
