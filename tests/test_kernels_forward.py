"""The forward kernels in Triton's interpreter: the specification, and what must hold whichever kernel made a number.

The interpreter computes in float32 what a GPU computes in tf32, and has no bfloat16: float16, which rounds at the
same places as bfloat16 does, stands for both.
"""

import pytest
import torch
from cases import CASES, FORMS, Case, Inputs, assert_as_good_as, bounds, exact, inputs

from gdn2_ops.kernels import chunk_forward

HALF = (torch.float32, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: str(dtype)[6:])
# Two reflections on nearly one key undo each other and nothing decays: the roundings of R and Kt, operands of matrix
# units, stay in the state (docs/decisions).
NEUTRAL = "130 tokens, equal keys, reflections"


def chunk(x, cu_seqlens=None):
    return chunk_forward.chunk(*x, cu_seqlens, x.q.shape[-1] ** -0.5)


def assert_as_good_as_the_specification(got, case: Case, x: Inputs, cu_seqlens=None) -> None:
    specifications = (form(*x, cu_seqlens=cu_seqlens) for form in FORMS)
    for name, y, z, *same in zip(("o", "final state"), got, exact(x, cu_seqlens=cu_seqlens), *specifications):
        budget = 2.0 if case.name == NEUTRAL and x.q.dtype != torch.float32 else 1.0
        size = z.abs().max().item() if z.numel() else 0.0
        assert_as_good_as(same, y, z, x.q.dtype, name, budget * size)


@every_dtype
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_chunk_is_the_specification(case, dtype):
    x = inputs(case, dtype)
    assert_as_good_as_the_specification(chunk(x, bounds(case)), case, x, bounds(case))
