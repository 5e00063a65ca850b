"""The specification, in float64, against a textbook loop, itself in chunks, and finite differences."""

import numpy as np
import pytest
import torch
from cases import (
    CASES,
    NAMES,
    OUTPUTS,
    Case,
    Inputs,
    assert_equal_to,
    bounds,
    cotangents,
    exact,
    gradient_sizes,
    gradients,
    inputs,
)

from gdn2_ops import reference

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def textbook(case: Case, x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Equation (1) as it is printed: per sequence, head and token, with the matrices I - k (b*k)^T and Diag(exp g)."""
    q, k, v, g, b, w = (y.numpy() for y in x[:6])
    o = np.full(v.shape, np.nan)
    final = np.zeros((case.N, case.HV, case.K, case.V)) if x.state is None else x.state.numpy().copy()
    bounds = [(n, 0, case.T) for n in range(case.B)]
    if case.cu_seqlens is not None:
        bounds = [(0, begin, end) for begin, end in zip(case.cu_seqlens, case.cu_seqlens[1:])]
    for n, (row, begin, end) in enumerate(bounds):
        for head in range(case.HV):
            key_head = head // (case.HV // case.H)
            S = final[n, head]
            for t in range(begin, end):
                k_t, b_t = k[row, t, key_head], b[row, t, key_head]
                erase = np.eye(case.K) - np.outer(k_t, b_t * k_t)
                decay = np.diag(np.exp(g[row, t, key_head]))
                S = erase @ decay @ S + np.outer(k_t, w[row, t, head] * v[row, t, head])
                o[row, t, head] = S.T @ q[row, t, key_head] / np.sqrt(case.K)
            final[n, head] = S
    return torch.from_numpy(o), torch.from_numpy(final)


@every_case
def test_recurrent_is_the_textbook(case):
    x = inputs(case)
    got = reference.recurrent(*x, cu_seqlens=bounds(case))
    for name, y, want in zip(OUTPUTS, got, textbook(case, x)):
        assert_equal_to(y, want, 1e-12, name)


def test_the_cases_stay_in_range():
    for case in CASES:
        o, state = exact(inputs(case), cu_seqlens=bounds(case))
        for y in (o, state):
            assert y.numel() == 0 or y.abs().max() < 100, case.name


@every_case
@pytest.mark.parametrize("chunk_size", [16, 64])
def test_chunkwise_is_recurrent(case, chunk_size):
    x, (do, dstate), options = inputs(case), cotangents(case), {"cu_seqlens": bounds(case)}
    want = gradients(reference.recurrent, x, do, dstate, **options)
    options["chunk_size"] = chunk_size
    by_autograd = gradients(reference.chunkwise, x, do, dstate, **options)
    by_formula = reference.chunkwise_backward(do, dstate, *x, **options)
    for name, y, z, size in zip((*OUTPUTS, *NAMES), by_autograd, want, gradient_sizes(want, x)):
        assert_equal_to(y, z, 1e-12, f"{name} of autograd", size)
    for name, y, z, size in zip(NAMES, by_formula, want[2:], gradient_sizes(want, x)[2:]):
        assert_equal_to(y, z, 1e-12, f"d{name} of the formulas", size)


@every_case
@pytest.mark.parametrize("chunk_size", [16, 64])
def test_chunkwise_keeps_five_digits_of_float32(case, chunk_size):
    x, options = inputs(case, torch.float32), {"cu_seqlens": bounds(case)}
    got = reference.chunkwise(*x, **options, chunk_size=chunk_size)
    for name, y, want in zip(OUTPUTS, got, exact(x, **options)):
        assert_equal_to(y.double(), want, 1e-5, name)


@pytest.mark.parametrize("g", [-30.0, -100.0, 0.0])
def test_gradients_are_finite_at_any_decay(g):
    case = Case("decay everywhere", 20, H=1, HV=1)
    x, (do, dstate) = inputs(case)._replace(g=torch.full((1, 20, 1, 8), g, dtype=torch.float64)), cotangents(case)
    want = gradients(reference.recurrent, x, do, dstate)
    got = gradients(reference.chunkwise, x, do, dstate, chunk_size=16)
    for name, y, z, size in zip((*OUTPUTS, *NAMES), got, want, gradient_sizes(want, x)):
        assert_equal_to(y, z, 1e-12, name, size)


@pytest.mark.parametrize("form", [reference.recurrent, reference.chunkwise])
@pytest.mark.parametrize("cu_seqlens", [None, (0, 1, 1, 4)])
def test_gradcheck(form, cu_seqlens):
    case = Case("gradcheck", 4, H=1, HV=2, K=2, V=2, B=1, decay="channels", cu_seqlens=cu_seqlens)
    x, options = inputs(case), {"cu_seqlens": bounds(case)}
    assert torch.autograd.gradcheck(lambda *leaves: form(*leaves, **options), tuple(x.leaves()), fast_mode=False)
    without_state = x._replace(state=None)
    leaves = without_state.leaves().tensors()
    assert torch.autograd.gradcheck(lambda *six: form(*six, **options), leaves, fast_mode=True)


@pytest.mark.parametrize("form", [reference.recurrent, reference.chunkwise])
def test_no_state_is_a_state_of_zeros(form):
    x = inputs(Case("zeros", 21, B=2, state=False))
    for y, z in zip(form(*x), form(*x._replace(state=torch.zeros(2, 2, 8, 6, dtype=torch.float64)))):
        assert torch.equal(y, z)


def test_no_gradient_of_the_state_is_zeros():
    case = Case("zeros", 21, B=2)
    x, (do, dstate) = inputs(case), cotangents(case)
    got = reference.chunkwise_backward(do, None, *x)
    for y, z in zip(got, reference.chunkwise_backward(do, torch.zeros_like(dstate), *x)):
        assert torch.equal(y, z)


@pytest.mark.parametrize("form", [reference.recurrent, reference.chunkwise])
def test_packed_is_separate_calls(form):
    case = Case("packed", 50, cu_seqlens=(0, 0, 13, 30, 30, 50), HV=4, decay="channels")
    x = inputs(case)
    o, final = form(*x, cu_seqlens=bounds(case))
    for n, (begin, end) in enumerate(zip(case.cu_seqlens, case.cu_seqlens[1:])):
        alone = Inputs(*(y[:, begin:end] for y in x[:6]), x.state[n : n + 1])
        o_n, final_n = form(*alone)
        assert torch.equal(o[:, begin:end], o_n) and torch.equal(final[n : n + 1], final_n)


def test_step_is_one_token():
    x = inputs(Case("step", 1, B=3, HV=4))
    o, state = reference.step(*(y[:, 0] for y in x[:6]), x.state, scale=0.7)
    o_T, state_T = reference.recurrent(*x, scale=0.7)
    assert torch.equal(o, o_T[:, 0]) and torch.equal(state, state_T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_float32_arithmetic_rounded_once(dtype):
    case = Case("rounding", 19)
    x = inputs(case, dtype)
    wide = Inputs(*(y.float() for y in x))
    for form in (reference.recurrent, reference.chunkwise):
        (o, state), (o_wide, state_wide) = form(*x), form(*wide)
        assert o.dtype == dtype and torch.equal(o, o_wide.to(dtype))
        assert state.dtype == torch.float32 and torch.equal(state, state_wide)
