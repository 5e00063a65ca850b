"""What a version of torch cannot do: a condition that names the version and the error, and fails when that is gone."""

from __future__ import annotations

import pytest
import torch

TORCH = ".".join(torch.__version__.split(".")[:2])


def fails_on(version: str, error: type[BaseException], reason: str) -> pytest.MarkDecorator:
    """The test fails with this error on this version of torch ("2.11"), and passes on every other."""
    return pytest.mark.xfail(version == TORCH, raises=error, reason=f"torch {version}: {reason}", strict=True)
