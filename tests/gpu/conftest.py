"""Tests on a GPU: `make gpu-check`. Elsewhere they are skipped."""

import pytest
import torch


@pytest.fixture(autouse=True)
def device() -> str:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU in this machine; make gpu-check runs this on one")
    return "cuda"
