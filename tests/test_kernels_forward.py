"""The forward kernels in Triton's interpreter, against the specification."""

import pytest
import torch
from cases import CASES, FORMS, Case, assert_as_good_as, bounds, exact, inputs

from gdn2_ops.kernels import chunk_forward


def chunk(x, cu_seqlens=None):
    return chunk_forward.chunk(*x, cu_seqlens, x.q.shape[-1] ** -0.5)


def assert_chunk_as_good_as_the_specification(case: Case, dtype: torch.dtype) -> None:
    x, options = inputs(case, dtype), {"cu_seqlens": bounds(case)}
    specifications = (form(*x, **options) for form in FORMS)
    for name, y, z, *same in zip(
        ("o", "final state"), chunk(x, **options), exact(x, **options), *specifications, strict=True
    ):
        assert_as_good_as(same, y, z, dtype, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_chunk_is_the_specification(case, dtype):
    assert_chunk_as_good_as_the_specification(case, dtype)
