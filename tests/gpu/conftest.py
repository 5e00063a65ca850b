"""Tests on a GPU: `make gpu-check`. Elsewhere they are skipped."""

import pytest
from gpu_building import skip_without_gpu


@pytest.fixture(autouse=True)
def device() -> str:
    skip_without_gpu()
    return "cuda"
