"""Laws of the operators: what must hold whichever kernel made the numbers."""

import ctypes
import os

import pytest
import torch
from cases import CASES, DTYPES, FORMS, Case, Inputs, assert_as_good_as, bounds, exact, inputs
from hypothesis import given, settings
from hypothesis import strategies as st

import gdn2_ops
from gdn2_ops import gates, reference

LONG = Case("long", 65, B=2, HV=4)
CUT = (
    LONG,
    Case("equal keys", 33, keys="equal", erase="one"),
    Case("resets", 40, decay="resets", K=5, V=3),
    Case("no decay", 20, decay="none", erase="two", state=False),
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def assert_law(got, case: Case, x: Inputs, **options) -> None:
    """The outputs got by another way are as good as the specification of the whole.

    One rounding is measured by the values and states too: w v - r cancels, and a drawn case may have one channel.
    """
    terms = [y.abs().max().item() for y in (x.v, x.state) if y is not None and y.numel()]
    specifications = (form(*x, **options) for form in FORMS)
    for name, y, z, *same in zip(("o", "final state"), got, exact(x, **options), *specifications):
        size = max([*terms, z.abs().max().item()]) if z.numel() else 0.0
        assert_as_good_as(same, y, z, x.q.dtype, name, size)


def tokens(x: Inputs, begin: int, end: int, state: torch.Tensor | None) -> Inputs:
    return Inputs(*(y[:, begin:end] for y in x[:6]), state)


def in_pieces(x: Inputs, cuts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """chunk on each piece, the state handed on."""
    outs, state = [], x.state
    for begin, end in zip([0, *cuts], [*cuts, x.q.shape[1]]):
        o, state = gdn2_ops.chunk(*tokens(x, begin, end, state))
        outs.append(o)
    return torch.cat(outs, 1), state


@every_dtype
@pytest.mark.parametrize("case", [c for c in CASES if c.state and c.cu_seqlens is None], ids=lambda case: case.name)
def test_chunk_is_the_scan_of_step(case, dtype):
    x = inputs(case, dtype)
    outs, state, pool = [x.v[:, :0]], x.state, x.state.clone()
    for t in range(case.T):
        token = [y[:, t] for y in x[:6]]
        o, state = gdn2_ops.step(*token, state)
        assert torch.equal(gdn2_ops.step_inplace(*token, pool), o)
        outs.append(o[:, None])
    assert torch.equal(pool, state)
    assert_law((torch.cat(outs, 1), state), case, x)


@every_dtype
@pytest.mark.parametrize("case", CUT, ids=lambda case: case.name)
def test_cutting_anywhere_changes_nothing(case, dtype):
    x = inputs(case, dtype)
    for cut in range(case.T + 1):
        assert_law(in_pieces(x, [cut]), case, x)


@every_dtype
@pytest.mark.parametrize("cuts", [[], [0, 0, 65], [1, 2, 3], [16, 32, 48, 64], [15, 31, 47, 63], list(range(1, 65))])
def test_cutting_often_changes_nothing(cuts, dtype):
    x = inputs(LONG, dtype)
    assert_law(in_pieces(x, cuts), LONG, x)


@every_dtype
@pytest.mark.parametrize("T", [1, 16, 33])
@pytest.mark.parametrize("K", [5, 64])
def test_a_sequence_does_not_see_its_batch(K, T, dtype):
    x = inputs(Case("batch", T, B=4, HV=4, K=K, V=K), dtype)
    together = gdn2_ops.chunk(*x)
    others = [y.clone() for y in x]
    for y in others:
        y[0], y[2:] = float("nan"), 0.0
    among_others = gdn2_ops.chunk(*others)
    alone = gdn2_ops.chunk(*(y[1:2] for y in x))
    for y, z, a in zip(together, among_others, alone):
        assert torch.equal(y[1], z[1]) and torch.equal(y[1:2], a)


@every_dtype
def test_a_packed_sequence_does_not_see_its_neighbours(dtype):
    case = Case("neighbours", 61, cu_seqlens=(0, 20, 20, 45, 61))
    x = inputs(case, dtype)
    want = gdn2_ops.chunk(*x, cu_seqlens=bounds(case))
    changed = Inputs(*(y.clone() for y in x))
    for y in changed[:6]:
        y[:, :20], y[:, 45:] = float("nan"), 0.0
    changed.state[0], changed.state[3] = float("nan"), 0.0
    got = gdn2_ops.chunk(*changed, cu_seqlens=bounds(case))
    alone = gdn2_ops.chunk(*tokens(x, 20, 45, x.state[2:3]))
    assert torch.equal(got.o[:, 20:45], want.o[:, 20:45]) and torch.equal(got.state[1:3], want.state[1:3])
    assert torch.equal(alone.o, want.o[:, 20:45]) and torch.equal(alone.state, want.state[2:3])


@every_dtype
@pytest.mark.parametrize("case", CUT, ids=lambda case: case.name)
def test_the_past_does_not_see_the_future(case, dtype):
    x = inputs(case, dtype)
    o, _ = gdn2_ops.chunk(*x)
    future = inputs(Case("another " + case.name, case.T, "channels", "two", B=case.B, HV=case.HV, K=case.K, V=case.V))
    for t in (0, 1, 7, 15, 16, 17, 19, 31, 32, 33, 47, 63, 64):
        if t < case.T:
            changed = [y.clone() for y in x[:6]]
            for y, z in zip(changed, future):
                y[:, t:] = 3 * z[:, t:].to(y.dtype)
            o_changed, _ = gdn2_ops.chunk(*changed, x.state)
            assert torch.equal(o_changed[:, :t], o[:, :t]), f"o before token {t} changed"
            assert not torch.equal(o_changed[:, t], o[:, t])


@every_dtype
def test_tied_gates_are_kda(dtype):
    x = inputs(Case("tied", 40, HV=4), dtype)
    beta = x.b[..., 0]
    tied = gates.kda(x.k, x.v, x.g, beta)
    got = gdn2_ops.chunk(x.q, x.k, x.v, *tied, x.state)
    q, k, g, v, beta = (y.double() for y in (x.q, x.k, x.g, x.v, beta))
    S, outs = x.state.double(), []
    q, k, g, beta = (y.repeat_interleave(2, 2) for y in (q, k, g, beta))
    for t in range(40):  # Kimi Delta Attention as its paper has it, one beta
        S = g[:, t, :, :, None].exp() * S
        delta = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], S)
        S = S + torch.einsum("bh,bhk,bhv->bhkv", beta[:, t], k[:, t], delta)
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S) * 8**-0.5)
    specification = reference.recurrent(x.q, x.k, x.v, *tied, x.state)
    for s, y, z in zip(specification, got, (torch.stack(outs, 1), S)):
        assert_as_good_as([s], y, z, dtype)


@every_dtype
@pytest.mark.parametrize("T, padding", [(5, 3), (16, 16), (17, 47), (33, 100)])
def test_padding_is_inert(T, padding, dtype):
    case = Case("padded", T + padding, B=2)
    x = inputs(case, dtype)
    for y in (x.g, x.b, x.w):
        y[:, T:] = 0.0
    o, state = gdn2_ops.chunk(*x)
    assert_law((o[:, :T], state), case, tokens(x, 0, T, x.state))
    token = [y[:, -1] for y in x[:6]]
    assert torch.equal(gdn2_ops.step(*token, x.state).state, x.state)


@pytest.mark.parametrize("T", [1, 40])
def test_output_is_linear_in_values_and_state(T):
    x, y = (inputs(Case(f"linear {n}", T, B=2), torch.float32) for n in (1, 2))
    both = x._replace(v=2 * x.v - 3 * y.v, state=2 * x.state - 3 * y.state)
    parts = [gdn2_ops.chunk(*x), gdn2_ops.chunk(*x._replace(v=y.v, state=y.state))]
    for got, one, other in zip(gdn2_ops.chunk(*both), *parts):
        torch.testing.assert_close(got, 2 * one - 3 * other, rtol=1e-5, atol=2e-5)
    nothing = gdn2_ops.chunk(*x._replace(v=torch.zeros_like(x.v), state=None))
    assert not nothing.o.any() and not nothing.state.any()


@every_dtype
def test_twice_the_values_and_state_give_twice_the_output(dtype):
    x = inputs(Case("twice", 40, HV=4), dtype)
    twice = gdn2_ops.chunk(*x._replace(v=2 * x.v, state=2 * x.state))
    for y, z in zip(twice, gdn2_ops.chunk(*x)):
        torch.testing.assert_close(y, 2 * z, rtol=0, atol=2**-23 if y.dtype == torch.float16 else 0)  # subnormals round


@pytest.fixture
def poisoned_empty():
    """Everything torch.empty gives out is NaN, and all that malloc does, which the operators' outputs come from.

    glibc fills memory with the complement of the byte it is told. Sanitizers have a malloc of their own.
    """
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    mallopt, M_PERTURB = ctypes.CDLL(None).mallopt, -6
    assert mallopt(M_PERTURB, 0x100) or "san.so" in os.environ.get("LD_PRELOAD", "")  # 0xff; of 0 it makes none
    yield
    mallopt(M_PERTURB, 0)
    torch.use_deterministic_algorithms(False)


def every_result(x: Inputs, cu_seqlens: torch.Tensor | None) -> list[torch.Tensor]:
    leaves = x.leaves()
    chunked = gdn2_ops.chunk(*leaves, cu_seqlens=cu_seqlens)
    grads = torch.autograd.grad(sum(y.sum() for y in chunked), leaves.tensors(), materialize_grads=True)
    token = [y[:, -1] for y in x[:6]]
    state = chunked.state.detach()[:1]
    stepped = gdn2_ops.step(*token, state)
    return [
        *chunked,
        *grads,
        *stepped,
        gdn2_ops.step_inplace(*token, torch.cat((state, state)), slots=torch.tensor([1])),
    ]


@every_dtype
@pytest.mark.parametrize("cu_seqlens", [None, (0, 0, 5, 21, 21, 37)])
def test_nothing_is_left_uninitialised(cu_seqlens, dtype, request):
    case = Case("poisoned", 37, cu_seqlens=cu_seqlens, HV=4, K=5, V=3)
    want = every_result(inputs(case, dtype), bounds(case))
    request.getfixturevalue("poisoned_empty")
    assert torch.empty(3).isnan().all()
    for y, z in zip(every_result(inputs(case, dtype), bounds(case)), want):
        assert y.isfinite().all() and torch.equal(y, z)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_shape_cut_anywhere(data):
    group = data.draw(st.sampled_from([1, 2, 3]), "HV / H")
    H, B, T = (data.draw(st.integers(low, high), name) for name, low, high in (("H", 1, 3), ("B", 1, 3), ("T", 0, 40)))
    K, V = (data.draw(st.integers(1, 9), name) for name in "KV")
    decay = data.draw(st.sampled_from(["none", "weak", "resets", "channels"]), "decay")
    erase = data.draw(st.sampled_from(["none", "uniform", "one", "two"]), "erase")
    cuts = sorted(data.draw(st.lists(st.integers(0, T), max_size=4), "cuts"))
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    case = Case("drawn", T, decay, erase, B=B, H=H, HV=group * H, K=K, V=V)
    x = inputs(case, dtype)
    assert_law(gdn2_ops.chunk(*x), case, x)
    assert_law(in_pieces(x, cuts), case, x)
    if B == 1:  # the same cuts as bounds of packed sequences
        packed = Case("drawn", T, decay, erase, H=H, HV=group * H, K=K, V=V, cu_seqlens=(0, *cuts, T))
        y = inputs(packed, dtype)
        assert_law(gdn2_ops.chunk(*y, cu_seqlens=bounds(packed)), packed, y, cu_seqlens=bounds(packed))
