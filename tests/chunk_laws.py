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
NEUTRAL = "130 tokens, equal keys, reflections"
FORGETS = "65 tokens, resets, full erase"  # the initial state: its gradient is 1e-13 times that of the final state
STATE = NAMES.index("state")
FLOAT32 = 2e-6  # of the largest number, in float32
# The error of float16 on the shared cases is within the budget in the interpreter. With other seeds of NEUTRAL it is up
# to 2.2 times the budget, of the final state, and a GPU sums in another order, rounds to tf32 inside blocks, which the
# interpreter does not, and runs bfloat16, which has one half of dT.
ON_A_GPU = 2.0


def assert_outputs(got, case: Case, x: Inputs, cu_seqlens=None, *, undone: float = 1.0) -> None:
    """Outputs and final state, on the CPU, are as good as the specification's.

    undone: how much more rounding half precision may have where an erase of two undoes what was written.
    """
    specifications = (form(*x, cu_seqlens=cu_seqlens) for form in FORMS)
    for name, y, z, *same in zip(OUTPUTS, got, exact(x, cu_seqlens=cu_seqlens), *specifications):
        if x.q.dtype == torch.float32:
            assert_equal_to(y, z, FLOAT32, name)
        budget = undone if case.name == NEUTRAL and x.q.dtype != torch.float32 else 1.0
        size = z.abs().max().item() if z.numel() else 0.0
        assert_as_good_as(same, y, z, x.q.dtype, name, budget * size)


def _sizes(case: Case, x: Inputs, want: list[torch.Tensor], undone: float) -> list[float]:
    """What one rounding of each gradient is measured by."""
    found = gradient_sizes(want, x)[2:]
    if case.name == FORGETS:  # a rounding of g = -30 is 30 of what it decays, and the least number of float16 is 6e-8
        found[STATE] = max(30 * found[STATE], torch.finfo(x.q.dtype).tiny)
    if x.q.dtype != torch.float32 and case.erase == "two":
        first = 0 if case.keys == "equal" else STATE  # a case may have no state
        found[first:] = [undone * size for size in found[first:]]
    return found


def assert_gradients(got, case: Case, x: Inputs, do, dstate, *, undone: float = 1.0) -> None:
    """Every gradient, on the CPU. undone: as in `assert_outputs`."""
    options = {"cu_seqlens": bounds(case)}
    zero = torch.zeros(case.N, case.HV, case.K, case.V) if dstate is None else dstate
    want = gradients(reference.recurrent, x.double(), do.double(), zero.double(), **options)
    specifications = [gradients(form, x, do, zero, **options)[2:] for form in FORMS]
    for name, y, z, size, *same in zip(NAMES, got, want[2:], _sizes(case, x, want, undone), *specifications):
        if x.q.dtype == torch.float32 and case in CASES:  # a head of one channel may have a gradient that cancels
            assert_equal_to(y, z, FLOAT32, f"d{name}")
        assert_as_good_as(same, y, z, x.q.dtype, f"d{name}", size)
