"""What the gradients of the chunk kernels are held to, for tensors of any device: "cpu" in Triton's interpreter
(tests/test_kernels_backward.py), "cuda" on a GPU (tests/gpu)."""

from __future__ import annotations

import torch
from cases import FORMS, NAMES, NEUTRAL, Case, Inputs, assert_as_good_as, bounds, gradient_sizes, gradients

from gdn2_ops import reference
from gdn2_ops.kernels import chunk_backward

FORGETS = "65 tokens, resets, full erase"  # the initial state: its gradient is 1e-13 times that of the final state
STATE = NAMES.index("state")


def backward(x, do, dstate, cu_seqlens=None):
    return chunk_backward.chunk_backward(do, dstate, *x, cu_seqlens, x.q.shape[-1] ** -0.5)


def sizes(case: Case, x: Inputs, want: list[torch.Tensor]) -> list[float]:
    """What one rounding of each gradient is measured by."""
    found = gradient_sizes(want, x)[2:]
    if case.name == FORGETS:  # a rounding of g = -30 is 30 of what it decays, and the least number of float16 is 6e-8
        found[STATE] = max(30 * found[STATE], torch.finfo(x.q.dtype).tiny)
    half = x.q.dtype != torch.float32
    if case.name == NEUTRAL or (half and case.keys == "equal" and case.erase == "two"):
        found = [(2 if half else 8) * size for size in found]  # (I + T)^-1 as a factor keeps less than substitution
    return found


def assert_as_good_as_the_specification(got, case: Case, x: Inputs, do, dstate) -> None:
    options = {"cu_seqlens": bounds(case)}
    zero = torch.zeros(case.N, case.HV, case.K, case.V) if dstate is None else dstate
    want = gradients(reference.recurrent, x.double(), do.double(), zero.double(), **options)
    specifications = [gradients(form, x, do, zero, **options)[2:] for form in FORMS]
    for name, y, z, size, *same in zip(NAMES, got, want[2:], sizes(case, x, want), *specifications):
        assert_as_good_as(same, y, z, x.q.dtype, f"d{name}", size)
