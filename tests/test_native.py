"""The native CPU kernels with every instruction set of the machine: hard cases, odd sizes, threads, exponentials."""

import ctypes

import numpy as np
import pytest
import torch
from cases import CASES, DTYPES, Case, assert_chunk_as_good_as_the_specification, cotangents, inputs

import gdn2_ops
from gdn2_ops.compiled import find_library

LIBRARY = ctypes.CDLL(str(find_library("libgdn2_torch.so")))
ISAS = {"portable": 0, "avx2": 1, "avx512": 2}
ODD_SIZES = ((1, 1), (2, 3), (3, 17), (5, 33), (16, 16), (31, 70), (64, 129), (100, 100), (130, 8), (256, 256))


@pytest.fixture(params=ISAS)
def isa(request):
    best = LIBRARY.gdn2_isa()
    if not LIBRARY.gdn2_set_isa(ISAS[request.param]):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    assert LIBRARY.gdn2_set_isa(best)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_instruction_set_is_as_good_as_the_specification(isa, case, dtype):
    assert_chunk_as_good_as_the_specification(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ["avx2", "avx512"], indirect=True)
def test_instruction_sets_agree_to_rounding(isa, dtype):
    case = Case("agree", 130, H=2, HV=4, K=100, V=70)
    x, (do, dstate) = inputs(case, dtype), cotangents(case, dtype)

    def results():
        token = gdn2_ops.step(*(y[:, -1] for y in x[:6]), x.state)
        return [*gdn2_ops.chunk(*x), *token, *torch.ops.gdn2.chunk_backward(do, dstate, *x, None, 0.1)]

    got = results()
    assert LIBRARY.gdn2_set_isa(ISAS["portable"])
    for y, z in zip(got, results()):
        rounding = 2e-6 if y.dtype == torch.float32 else torch.finfo(y.dtype).eps
        assert (y.double() - z.double()).abs().max() <= rounding * z.double().abs().max()


@pytest.mark.parametrize("K, V", ODD_SIZES)
def test_every_head_size(isa, K, V):
    for dtype in DTYPES:
        case = Case(f"odd {K} {V}", 19, B=4 if K * V < 1000 else 1, H=2, HV=4, K=K, V=V)
        assert_chunk_as_good_as_the_specification(case, dtype)
        *rows, state = inputs(case, dtype)
        whole = gdn2_ops.chunk(*rows, state)
        for t in range(case.T):
            o, state = gdn2_ops.step(*(x[:, t] for x in rows), state)
            torch.testing.assert_close(o, whole.o[:, t], rtol=0.02 if dtype != torch.float32 else 1e-4, atol=1e-4)
        torch.testing.assert_close(state, whole.state, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("K, V", [(128, 128), (128, 256), (128, 64), (128, 208), (20, 24)])
def test_the_heads_that_a_thread_walks_together_change_nothing(isa, K, V):
    """Bit for bit: many states, 128 columns at a time where V allows it, and each alone; in place and not."""
    case = Case("many states", 1, B=50, H=1, HV=2, K=K, V=V)  # 128 x 128: 6.6 MB
    *rows, state = inputs(case, torch.float32)
    rows = [x[:, 0] for x in rows]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        o, after = gdn2_ops.step(*rows, state)
        for n in range(case.B):
            alone = gdn2_ops.step(*(x[n : n + 1] for x in rows), state[n : n + 1])
            assert torch.equal(alone.o[0], o[n]) and torch.equal(alone.state[0], after[n])
        slots = torch.arange(case.B).flip(0)
        pool = state.flip(0).contiguous()
        assert torch.equal(gdn2_ops.step_inplace(*rows, pool, slots=slots), o) and torch.equal(pool.flip(0), after)
    finally:
        torch.set_num_threads(threads)


def test_the_number_of_threads_changes_nothing(isa):
    """Bit for bit, with more heads than threads and with fewer, where the columns of a state are shared out."""
    threads = torch.get_num_threads()
    try:
        for case in (Case("many heads", 70, B=3, H=2, HV=4), Case("one head", 70, H=1, HV=1, K=64, V=200)):
            x = inputs(case, torch.float32)
            results = []
            for count in (1, 2, 3, 7):
                torch.set_num_threads(count)
                o, state = gdn2_ops.chunk(*x)
                grads = torch.ops.gdn2.chunk_backward(o, state, *x, None, 0.3)
                token = gdn2_ops.step(*(y[:, 0] for y in x[:6]), x.state)
                results.append((o, state, *grads, *token))
            for other in results[1:]:
                assert all(torch.equal(y, z) for y, z in zip(results[0], other))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("V", [128, 64, 200])
def test_the_order_in_which_a_thread_walks_its_heads_changes_nothing(isa, V):
    """Bit for bit: a state in the caches is walked up and down in turn."""
    case = Case("up and down", 1, B=3, H=2, HV=4, K=24, V=V)
    *rows, state = inputs(case, torch.float32)
    rows, mine, results = [x[:, 0] for x in rows], state.clone(), []
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for _ in range(3):
            mine.copy_(state)
            results.append((gdn2_ops.step_inplace(*rows, mine), mine.clone()))
        for n in range(case.B):  # alone: two heads for each key
            alone = gdn2_ops.step(*(x[n : n + 1] for x in rows), state[n : n + 1])
            for o, after in results:
                assert torch.equal(o[n], alone.o[0]) and torch.equal(after[n], alone.state[0])
    finally:
        torch.set_num_threads(threads)


def test_state_may_be_its_own_successor(isa):
    """step and step_inplace are the same bits; a pool is touched in the named rows only."""
    *rows, state = inputs(Case("in place", 1, B=3, H=2, HV=4, K=40, V=24), torch.float32)
    rows = [x[:, 0] for x in rows]
    o, after = gdn2_ops.step(*rows, state)
    pool = torch.full((6, *state.shape[1:]), float("nan"))
    slots = torch.tensor([4, 0, 3])
    pool[slots] = state
    assert torch.equal(gdn2_ops.step_inplace(*rows, pool, slots=slots), o)
    assert torch.equal(pool[slots], after)
    assert pool[[1, 2, 5]].isnan().all()


def test_exponentials_are_within_two_units_in_the_last_place(isa):
    x = np.concatenate(
        (
            np.linspace(-104, 88.7, 1_000_003, dtype=np.float32),
            -np.logspace(-38, 2, 200_003, dtype=np.float32),
            np.array([0.0, -0.0, -87.33655, -103.97208], np.float32),
        )
    )
    y = np.empty_like(x)
    pointer = ctypes.POINTER(ctypes.c_float)
    LIBRARY.gdn2_exp(x.ctypes.data_as(pointer), y.ctypes.data_as(pointer), ctypes.c_int64(x.size))
    want = np.exp(x.astype(np.float64))
    unit = np.maximum(np.spacing(want.astype(np.float32)).astype(np.float64), np.finfo(np.float32).tiny * 2**-23)
    normal = want >= np.finfo(np.float32).tiny
    assert (np.abs(y - want)[normal] <= 2 * unit[normal]).all()
    assert (np.abs(y - want)[~normal] <= np.finfo(np.float32).tiny).all()  # a denormal may be flushed


def test_exponentials_of_what_is_no_number(isa):
    x = np.array([-np.inf, np.nan, -1e30, np.inf], np.float32)
    y = np.empty_like(x)
    pointer = ctypes.POINTER(ctypes.c_float)
    LIBRARY.gdn2_exp(x.ctypes.data_as(pointer), y.ctypes.data_as(pointer), ctypes.c_int64(x.size))
    assert y[0] == 0 and np.isnan(y[1]) and y[2] == 0 and y[3] == np.inf
