"""torch.func: a map is the calls one by one, gradients are the same inside and outside, and what is missing says so."""

from itertools import chain, combinations

import pytest
import torch
from cases import NAMES, Case, bounds, cotangents, inputs
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map

import gdn2_ops
from gdn2_ops import reference

OPS = torch.ops.gdn2
ROWS = 3
SEQUENCES = Case("mapped", 19, B=2, HV=4, K=4, V=6)
PACKED = Case("mapped, packed", 19, HV=4, K=4, V=6, cu_seqlens=(0, 5, 5, 19))


def arguments(name: str, case: Case = SEQUENCES) -> list:
    """Arguments of one operator that ROWS rows can share."""
    x, scale = inputs(case, torch.float32), 0.5
    if name == "chunk":
        return [*x, bounds(case), scale]
    if name == "chunk_backward":
        return [*cotangents(case, torch.float32), *x, bounds(case), scale]
    token = [y[:, 0] for y in x[:6]]
    return [*token, x.state, scale] if name == "step" else [*token, x.state, None, scale]


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """ROWS different tensors like x, the first of them x."""
    if x.is_floating_point():
        return torch.stack([x, 0.5 * x, 0.25 * x])  # decays stay <= 0 and gates in [0, 1]
    return torch.tensor([[0, 5, 5, 19], [0, 0, 18, 19], [0, 19, 19, 19]])


def subsets(positions: list[int]) -> list[tuple[int, ...]]:
    """One alone, all but one, all."""
    n = len(positions)
    return sorted(set(chain.from_iterable(combinations(positions, r) for r in (1, n - 1, n))))


def assert_a_map_is_the_calls_one_by_one(op, args: list, mapped: tuple[int, ...], axis: int) -> None:
    in_dims = tuple(axis if i in mapped else None for i in range(len(args)))
    stacked = [rows_of(x).movedim(0, axis).contiguous() if i in mapped else x for i, x in enumerate(args)]
    got = torch.vmap(op, in_dims=in_dims)(*stacked)
    want = [op(*(rows_of(x)[n] if i in mapped else x for i, x in enumerate(args))) for n in range(ROWS)]
    for y, *each in zip(got, *want):
        assert torch.equal(y, torch.stack(each)), f"mapped {mapped}, axis {axis}"


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("case", [SEQUENCES, PACKED], ids=["batch", "packed"])
@pytest.mark.parametrize("name", ["chunk", "chunk_backward", "step"])
def test_any_subset_of_inputs_is_mapped(name, case, axis):
    args = arguments(name, case if name != "step" else SEQUENCES)
    for mapped in subsets([i for i, x in enumerate(args) if isinstance(x, torch.Tensor)]):
        assert_a_map_is_the_calls_one_by_one(getattr(OPS, name), args, mapped, axis)


def test_public_functions_are_mapped_twice():
    q, k, v, g, b, w, state = inputs(SEQUENCES, torch.float32)

    def outputs(q, k):
        return gdn2_ops.chunk(q, k, v, g, b, w, state)

    twice = torch.vmap(torch.vmap(outputs, in_dims=(None, 0)), in_dims=(0, None))
    o, final = twice(rows_of(q), rows_of(k))
    assert o.shape[:2] == final.shape[:2] == (ROWS, ROWS)
    for i in range(ROWS):
        for j in range(ROWS):
            want = gdn2_ops.chunk(rows_of(q)[i], rows_of(k)[j], v, g, b, w, state)
            assert torch.equal(o[i, j], want.o) and torch.equal(final[i, j], want.state)


def test_a_mapped_bound_is_checked_in_its_row():
    *x, _, scale = arguments("chunk", PACKED)
    with pytest.raises(ValueError, match=r"end at T = 19, got \[0, 5, 5, 18\]"):
        torch.vmap(OPS.chunk, in_dims=(*[None] * 7, 0, None))(*x, torch.tensor([[0, 5, 5, 19], [0, 5, 5, 18]]), scale)


@pytest.mark.parametrize("slots", [None, torch.tensor([4, 1]), torch.tensor([[4, 1], [0, 5], [1, 2]])])
def test_mapped_states_are_overwritten(slots):
    q, k, v, g, b, w, state, _, _ = arguments("step_inplace")
    pool = state if slots is None else torch.cat((state, -state, 2 * state))
    pools, keys = rows_of(pool), rows_of(k)
    each = [None if slots is None else slots[n] if slots.dim() == 2 else slots for n in range(ROWS)]
    wanted_pools = pools.clone()
    want = [OPS.step_inplace(q, keys[n], v, g, b, w, wanted_pools[n], each[n], 0.5) for n in range(ROWS)]

    def decode(k, pool, slots):
        return gdn2_ops.step_inplace(q, k, v, g, b, w, pool, slots=slots, scale=0.5)

    o = torch.vmap(decode, in_dims=(0, 0, 0 if slots is not None and slots.dim() == 2 else None))(keys, pools, slots)
    assert torch.equal(o, torch.stack(want)) and torch.equal(pools, wanted_pools)


def test_a_map_that_cannot_write_its_states_is_refused():
    q, k, v, g, b, w, state, slots, scale = arguments("step_inplace")
    with pytest.raises(ValueError, match=r"gdn2::step_inplace: expected a state that torch.vmap maps.*gdn2_ops.step"):
        torch.vmap(lambda k: OPS.step_inplace(q, k, v, g, b, w, state, slots, scale))(rows_of(k))
    elsewhere = torch.stack([state, state], 2)
    with pytest.raises(ValueError, match="contiguous with the mapped axis first, got it as axis 2"):
        torch.vmap(lambda s: OPS.step_inplace(q, k, v, g, b, w, s, slots, scale), in_dims=2)(elsewhere)
    pools, row = torch.stack([state, state]), torch.tensor([0, 2])  # of two rows: 2 would be the first of the next pool
    with pytest.raises(ValueError, match=r"distinct slots in \[0, 2\), got \[0, 2\]"):
        torch.vmap(lambda s: OPS.step_inplace(q, k, v, g, b, w, s, row, scale))(pools)


def squares(outputs) -> torch.Tensor:
    return sum(y.square().sum() for y in outputs)


@pytest.mark.parametrize("name", ["chunk", "step"])
def test_functional_gradients_are_those_of_autograd(name):
    *tensors, scale = arguments(name)
    *rest, tensors = ([tensors.pop()], tensors) if name == "chunk" else ([], tensors)
    op = getattr(OPS, name)

    def loss(*x):
        return squares(op(*x, *chain(*rest), scale))

    leaves = [x.clone().requires_grad_() for x in tensors]
    want = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.func.grad(loss, argnums=tuple(range(7)))(*tensors)
    for x, y, z in zip(NAMES, got, want):
        assert torch.equal(y, z), x
    outside = [x.clone().requires_grad_() for x in tensors]
    with torch.no_grad():  # the transform differentiates, whatever stands outside
        assert all(map(torch.equal, torch.func.grad(loss, argnums=tuple(range(7)))(*outside), want))


@pytest.mark.parametrize("case", [SEQUENCES, PACKED], ids=["batch", "packed"])
def test_gradients_per_sample_are_those_of_each_sample(case):
    x, cu_seqlens = inputs(case, torch.float32), bounds(case)

    def loss(q, k, state):
        return squares(gdn2_ops.chunk(q, k, *x[2:6], state, cu_seqlens=cu_seqlens))

    samples = tuple(rows_of(y) for y in (x.q, x.k, x.state))
    got = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(*samples)
    one_by_one = [torch.func.grad(loss, argnums=(0, 1, 2))(*(y[n] for y in samples)) for n in range(ROWS)]
    for y, *each in zip(got, *one_by_one):
        assert torch.equal(y, torch.stack(each))
    of_the_map = torch.func.grad(lambda *y: torch.vmap(loss)(*y).sum(), argnums=(0, 1, 2))(*samples)
    assert all(map(torch.equal, of_the_map, got))


def test_the_jacobian_is_that_of_the_specification():
    x = inputs(Case("jacobian", 3, H=1, HV=1, K=2, V=2), torch.float32)

    def outputs(chunk):
        return lambda q, state: chunk(q, *x[1:6], state)[0]

    got = torch.func.jacrev(outputs(gdn2_ops.chunk), argnums=(0, 1))(x.q, x.state)
    want = torch.func.jacrev(outputs(reference.recurrent), argnums=(0, 1))(x.q, x.state)
    for y, z in zip(got, want):
        torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-6)


def test_derivatives_of_a_functional_gradient_are_refused():
    *x, cu_seqlens, scale = arguments("chunk")

    def slope(q):
        return torch.func.grad(lambda q: squares(OPS.chunk(q, *x[1:], cu_seqlens, scale)))(q).sum()

    second = r"gdn2::chunk_backward: expected at most one derivative.*reference"
    with pytest.raises(NotImplementedError, match=second):
        torch.func.grad(slope)(x[0])
    with pytest.raises(NotImplementedError, match=second):
        slope(x[0].clone().requires_grad_()).backward()
    with pytest.raises(NotImplementedError, match="expected reverse-mode differentiation"):
        torch.func.jvp(slope, (x[0],), (x[0],))


FORWARD_MODE = r"gdn2::{}: expected reverse-mode differentiation, got .* tangent .*use torch.func.vjp or jacrev"


@pytest.mark.parametrize("name", ["chunk", "chunk_backward", "step", "step_inplace"])
def test_forward_mode_is_refused(name):
    args, op = arguments(name), getattr(OPS, name)
    for i, x in enumerate(args):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            continue
        with pytest.raises(NotImplementedError, match=FORWARD_MODE.format(name)):
            torch.func.jvp(lambda y, i=i: op(*args[:i], y, *args[i + 1 :]), (x,), (torch.ones_like(x),))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            with pytest.raises(NotImplementedError, match=FORWARD_MODE.format(name)):
                op(*args[:i], dual, *args[i + 1 :])
            plain = tree_map(lambda y: y.clone() if isinstance(y, torch.Tensor) else y, args)
            assert all(y.isfinite().all() for y in op(*plain))  # others in the same level are served


def test_a_compiled_map_and_a_compiled_functional_gradient():
    x = inputs(SEQUENCES, torch.float32)

    def loss(k):
        return squares(gdn2_ops.chunk(x.q, k, *x[2:]))

    keys = rows_of(x.k)
    for function in (torch.vmap(loss), torch.vmap(torch.func.grad(loss))):
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(keys), function(keys), rtol=1e-5, atol=1e-6)
