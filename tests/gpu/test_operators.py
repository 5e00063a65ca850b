"""The operators on the tensors of a GPU: numbers, packed sequences, compiled, captured, and nothing compiled late."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from cases import CASES, DTYPES, Case, Inputs, bounds, cotangents, inputs
from chunk_laws import ON_A_GPU, assert_gradients, assert_outputs

import gdn2_ops
from gdn2_ops import kernels
from gdn2_ops.kernels import catalog, chunk_forward, step
from gdn2_ops.kernels.step_layer import LayerToken, LayerWeights, step_layer

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
SIZES = [(32, 32), (64, 64), (100, 72), (128, 128), (256, 256)]


def on(device: str, tensors):
    return [None if x is None else x.to(device) for x in tensors]


def assert_chunk(case: Case, dtype: torch.dtype, device: str) -> None:
    x = inputs(case, dtype)
    o, state = gdn2_ops.chunk(*on(device, x), cu_seqlens=on(device, [bounds(case)])[0])
    assert_outputs((o.cpu(), state.cpu()), case, x, bounds(case), undone=ON_A_GPU)


@every_dtype
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_chunk(case, dtype, device):
    assert_chunk(case, dtype, device)


def assert_gradients_of(case: Case, dtype: torch.dtype, device: str) -> None:
    x, (do, dstate) = inputs(case, dtype), cotangents(case, dtype)
    there = Inputs(*(None if y is None else y.to(device).requires_grad_() for y in x))
    o, state = gdn2_ops.chunk(*there, cu_seqlens=on(device, [bounds(case)])[0])
    wanted = [y for y in there if y is not None]
    got = dict(zip(map(id, wanted), torch.autograd.grad((o, state), wanted, on(device, (do, dstate)))))
    found = [got[id(y)].cpu() if y is not None else None for y in there]
    assert_gradients(found, case, x, do, dstate, undone=ON_A_GPU)


@every_dtype
@pytest.mark.parametrize("case", [case for case in CASES if case.state], ids=lambda case: case.name)
def test_gradients(case, dtype, device):
    assert_gradients_of(case, dtype, device)


@every_dtype
@pytest.mark.parametrize("K, V", SIZES)
def test_gradients_of_every_head_size(K, V, dtype, device):
    assert_gradients_of(Case(f"gradients of {K} and {V}", 130, H=1, HV=2, K=K, V=V), dtype, device)


@every_dtype
@pytest.mark.parametrize("K, cu_seqlens", [(32, None), (64, (0, 0, 5, 200, 200, 390)), (128, None)])
def test_gradients_of_more_chunks_than_share_a_state(K, cu_seqlens, dtype, device):
    assert_gradients_of(Case("groups", 390, cu_seqlens=cu_seqlens, H=1, HV=2, K=K, V=K), dtype, device)


def test_a_chunk_that_grows_has_gradients(device):
    """Unit keys, legal gates, no decay: A, which bfloat16 keeps in float16, reaches 4e6."""
    k = torch.tensor([[0.8912, 0.4537], [-0.4268, 0.9044]]).bfloat16().repeat(32, 1)[None, :, None]
    b = torch.tensor([[2.0, 0.0], [0.0, 2.0]]).bfloat16().repeat(32, 1)[None, :, None]
    e, ones = (b * k)[0, :, 0].double(), torch.ones_like(k)
    assert torch.linalg.inv(torch.eye(64) + (e @ k[0, :, 0].double().mT).tril(-1)).max() > 1e6
    x = [y.to(device).requires_grad_() for y in (k, k, ones, torch.zeros_like(k.float()), b, ones)]
    o, state = gdn2_ops.chunk(*x)
    for y in (o, state, *torch.autograd.grad((o, state), x, (torch.ones_like(o), torch.ones_like(state)))):
        assert y.isfinite().all() and y.any()


def test_gradients_have_the_same_bits_every_time(device):
    x, (do, dstate) = (f(Case("again", 300, B=2, H=2, HV=4, K=64, V=64), torch.bfloat16) for f in (inputs, cotangents))
    args = (*on(device, (do, dstate, *x)), None, 0.125)
    first = torch.ops.gdn2.chunk_backward(*args)
    assert all(torch.equal(y, z) for _ in range(5) for y, z in zip(torch.ops.gdn2.chunk_backward(*args), first))


@every_dtype
@pytest.mark.parametrize("K, V", SIZES)
def test_chunk_of_every_head_size(K, V, dtype, device):
    assert_chunk(Case(f"chunk of {K} and {V}", 130, H=1, HV=2, K=K, V=V, decay="resets"), dtype, device)


def test_a_long_sequence(device):
    assert_chunk(Case("long", 2000, H=2, HV=2, K=64, V=64, decay="channels"), torch.bfloat16, device)


def test_a_second_run_gives_the_same_bits(device):
    x = on(device, inputs(Case("again", 300, B=2, K=64, V=64), torch.bfloat16))
    first = gdn2_ops.chunk(*x)
    assert all(torch.equal(y, z) for _ in range(5) for y, z in zip(gdn2_ops.chunk(*x), first))


def test_a_sequence_does_not_see_its_batch(device):
    x = on(device, inputs(replace(CASES[3], name="batch", B=3, T=100), torch.bfloat16))
    whole = gdn2_ops.chunk(*x)
    for n in range(3):
        alone = gdn2_ops.chunk(*(y[n : n + 1] for y in x))
        assert all(torch.equal(y[n : n + 1], z) for y, z in zip(whole, alone))


def test_compiled_is_eager(device):
    x = on(device, inputs(Case("compiled", 40, K=32, V=32), torch.bfloat16))
    compiled = torch.compile(lambda *y: gdn2_ops.chunk(*y), fullgraph=True)
    assert all(torch.equal(y, z) for y, z in zip(compiled(*x), gdn2_ops.chunk(*x)))
    token = [y[:, 0] for y in x[:6]]
    stepped = torch.compile(lambda *y: gdn2_ops.step(*y), fullgraph=True)
    assert all(torch.equal(y, z) for y, z in zip(stepped(*token, x[6]), gdn2_ops.step(*token, x[6])))


def test_a_captured_step_replays(device):
    x = on(device, inputs(Case("captured", 1, B=2, K=64, V=64), torch.bfloat16))
    token, slots = [y[:, 0].contiguous() for y in x[:6]], torch.tensor([3, 1], device=device)
    pool = torch.zeros(4, *x[6].shape[1:], device=device)
    wanted = pool.clone()
    with torch.inference_mode():
        gdn2_ops.step_inplace(*token, pool.clone(), slots=slots)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o = gdn2_ops.step_inplace(*token, pool, slots=slots)
        pool.zero_()
        for _ in range(3):
            graph.replay()
            want_o = gdn2_ops.step_inplace(*token, wanted, slots=slots)
            assert torch.equal(o, want_o) and torch.equal(pool, wanted)


def compiled_so_far() -> int:
    """Kernels that Triton has compiled or loaded in this process."""
    functions = {kernel.function for kernel in catalog.catalog()}
    return sum(len(cache[0]) for function in functions for cache in function.device_caches.values())


def test_after_a_warm_up_nothing_compiles(device):
    kernels.warm_up(device, torch.float16, 64, 32, ("chunk", "backward", "step", "step_layer"))
    zeros = partial(torch.zeros, dtype=torch.float16, device=device)
    before = compiled_so_far()
    for B, H, HV in ((1, 1, 1), (2, 3, 6), (16, 16, 16)):
        x = on(device, inputs(Case("warm", 1, B=B, H=H, HV=HV, K=64, V=32), torch.float16))
        token = [y[:, 0] for y in x[:6]]
        step.step(*token, x[6], 1.0)
        gdn2_ops.chunk(*x)
        gdn2_ops.chunk(*(y[:1] for y in x[:6]), None, cu_seqlens=torch.tensor([0, 0, 1], device=device))
        slots = torch.arange(B, device=device)
        for index in (None, slots, slots.int()):
            step.step_inplace(*token, x[6], index, 1.0)
            step.step_inplace(*token, x[6].bfloat16(), index, 1.0)
            channels = 2 * H * 64 + HV * 32
            of_layer = LayerToken(zeros(B, channels), *(zeros(B, n) for n in (H * 64, H * 64, HV * 32, HV * 32)))
            weights = LayerWeights(zeros(channels, 4), zeros(H), zeros(H * 64), zeros(32))
            step_layer(of_layer, weights, zeros(B, channels, 3), x[6], slots=index)
    for T in (1, 2100):  # the longer one is walked in segments
        case = Case("warm", T, H=1, HV=1, K=64, V=32)
        x, (do, dstate) = (on(device, f(case, torch.float16)) for f in (inputs, cotangents))
        torch.ops.gdn2.chunk_backward(do, dstate, *x, None, 1.0)
    assert compiled_so_far() == before > 0


def test_no_number_is_left_unwritten(device):
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new tensors with NaN
    try:
        x = on(device, inputs(Case("poisoned", 70, K=40, V=33, state=False), torch.bfloat16))
        o, state = chunk_forward.chunk(*x, None, 1.0)
        assert o.isfinite().all() and state.isfinite().all()
        stepped = step.step(*(y[:, 0] for y in x[:6]), state, 1.0)
        assert all(y.isfinite().all() for y in stepped)
    finally:
        torch.use_deterministic_algorithms(False)
