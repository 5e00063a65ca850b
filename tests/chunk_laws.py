"""What the chunk kernels are held to: in the interpreter (tests/test_kernels_*.py) and on a GPU (tests/gpu)."""

from __future__ import annotations

import torch
from cases import (
    CASES,
    FORMS,
    NAMES,
    OUTPUTS,
    Case,
    Inputs,
    assert_as_good_as,
    assert_equal_to,
    bounds,
    exact,
    gradient_sizes,
    gradients,
)

from gdn2_ops import reference

# Two reflections on nearly one key undo each other and nothing decays: the roundings of X and Kx, operands of matrix
# units, stay in the state (docs/decisions/0005). In float64 I + T of its first chunk has condition 915 (3 in "130
# tokens"), and a row of its inverse sums to 37 in absolute value: float32 has 2e-6 because T and A are of float64.
# Over 14 seeds of "63 tokens, channels of every decay" in float16 the state's needs 0.7 to 1.4 roundings, whether X or
# R is what is rounded.
NEUTRAL = "130 tokens, equal keys, reflections"
FORGETS = "65 tokens, resets, full erase"  # the initial state: its gradient is 1e-13 times that of the final state
STATE = NAMES.index("state")
FLOAT32 = 2e-6  # of the largest number, in float32; of dg: of the terms that cancel in it


def assert_outputs(got, case: Case, x: Inputs, cu_seqlens=None) -> None:
    """Outputs and final state, on the CPU, are as good as the specification's."""
    specifications = (form(*x, cu_seqlens=cu_seqlens) for form in FORMS)
    for name, y, z, *same in zip(OUTPUTS, got, exact(x, cu_seqlens=cu_seqlens), *specifications):
        if x.q.dtype == torch.float32:
            assert_equal_to(y, z, FLOAT32, name)
        budget = 2.0 if case.name == NEUTRAL and x.q.dtype != torch.float32 else 1.0
        size = z.abs().max().item() if z.numel() else 0.0
        assert_as_good_as(same, y, z, x.q.dtype, name, budget * size)


def _sizes(case: Case, x: Inputs, want: list[torch.Tensor]) -> list[float]:
    """What one rounding of each gradient is measured by."""
    found = gradient_sizes(want, x)[2:]
    if case.name == FORGETS:  # a rounding of g = -30 is 30 of what it decays, and the least number of float16 is 6e-8
        found[STATE] = max(30 * found[STATE], torch.finfo(x.q.dtype).tiny)
    if x.q.dtype != torch.float32 and case.erase == "two":  # (I + T)^-1 as a factor keeps less than substitution
        first = 0 if case.keys == "equal" else STATE  # a case may have no state
        found[first:] = [2 * size for size in found[first:]]
    return found


def assert_gradients(got, case: Case, x: Inputs, do, dstate) -> None:
    options = {"cu_seqlens": bounds(case)}
    zero = torch.zeros(case.N, case.HV, case.K, case.V) if dstate is None else dstate
    want = gradients(reference.recurrent, x.double(), do.double(), zero.double(), **options)
    specifications = [gradients(form, x, do, zero, **options)[2:] for form in FORMS]
    plain = gradient_sizes(want, x)[2:]
    for name, y, z, size, terms, *same in zip(NAMES, got, want[2:], _sizes(case, x, want), plain, *specifications):
        if x.q.dtype == torch.float32 and case in CASES:  # a head of one channel may have a gradient that cancels
            assert_equal_to(y, z, FLOAT32, f"d{name}", terms)
        assert_as_good_as(same, y, z, x.q.dtype, f"d{name}", size)
