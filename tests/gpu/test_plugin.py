"""The TensorRT plugin's kernels on a GPU, driven as TensorRT drives it: numbers, one buffer, streams, graphs."""

import threading

import pytest
import torch
from cases import CASES, DTYPES, FORMS, OUTPUTS, Case, Inputs, assert_as_good_as, exact, inputs
from gpu_building import HEADS, build, skip_without_gpu
from plugin_host import Plugin

import gdn2_ops

SCALE = 0.5
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@pytest.fixture(scope="module")
def plugin(tmp_path_factory) -> Plugin:
    """With cubins for this GPU."""
    skip_without_gpu()
    folder = tmp_path_factory.mktemp("plugin")
    build(folder, "tensorrt")
    from gdn2_ops.export.plugin import TARGETS

    library, sources = TARGETS["tensorrt"]
    return Plugin(folder / library, folder, sources)


def tensors(case: Case, dtype: torch.dtype, device: str) -> Inputs:
    x = inputs(case, dtype)
    state = torch.zeros(case.B, case.HV, case.K, case.V) if x.state is None else x.state
    return Inputs(*(y.to(device).contiguous() for y in (*x[:6], state)))


def stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def assert_specification(plugin: Plugin, case: Case, dtype: torch.dtype, device: str) -> None:
    x = tensors(case, dtype, device)
    for most in (None, (case.B + 3, case.T + 1000)):
        got = plugin.attach(x, SCALE, most)(x, stream())
        torch.cuda.synchronize()
        here = Inputs(*(y.cpu() for y in x))
        specifications = zip(*(form(*here, scale=SCALE) for form in FORMS))
        for name, same, y, want in zip(OUTPUTS, specifications, got, exact(here, scale=SCALE)):
            assert_as_good_as(same, y.cpu(), want, dtype, f"{case.name}: {name}")


@every_dtype
def test_the_embedded_kernels_are_as_good_as_the_specification(dtype, device, plugin):
    for case in CASES:
        if case.cu_seqlens is None:
            assert_specification(plugin, case, dtype, device)
    for K in HEADS:
        for T in (1, 64, 300):
            assert_specification(plugin, Case(f"{T} tokens of {K}", T, B=2, H=1, HV=2, K=K, V=K), dtype, device)


@every_dtype
def test_a_long_sequence_walks_in_segments(dtype, device, plugin):
    case = Case("in segments", 8200, H=1, HV=1, K=64, V=64)
    x = tensors(case, dtype, device)
    got = plugin.attach(x, SCALE)(x, stream())
    want = gdn2_ops.chunk(*x, scale=SCALE)
    for y, z in zip(got, want):
        assert (y.double() - z.double()).abs().max() <= 2 * torch.finfo(dtype).eps * z.double().abs().max() + 2e-5


@every_dtype
@pytest.mark.parametrize("T", [1, 65])
def test_both_states_in_one_buffer(T, dtype, device, plugin):
    x = tensors(Case("one buffer", T, B=2, H=2, HV=4, K=64, V=64), dtype, device)
    layer = plugin.attach(x, SCALE)
    want_o, want_state = layer(x, stream())
    o, state = torch.full_like(want_o, float("nan")), x.state.clone()
    layer.enqueue(Inputs(*x[:6], state), o, state, stream())
    assert torch.equal(o, want_o) and torch.equal(state, want_state)


def test_four_threads_with_streams_of_their_own(device, plugin):
    """Each with its clone, shapes and workspace, all at once; the numbers are those of one after the other."""
    cases = [Case(f"thread {i}", T, B=1 + i, H=2, HV=4, K=64, V=64) for i, T in enumerate((1, 64, 200, 65))]
    found: dict[int, list] = {}
    x = [tensors(case, torch.bfloat16, device) for case in cases]
    want = [plugin.attach(y, SCALE)(y, stream()) for y in x]
    torch.cuda.synchronize()

    def work(i: int) -> None:
        torch.zeros(1, device=device)  # makes the context current in this thread
        own = torch.cuda.Stream()
        with torch.cuda.stream(own):
            layer = plugin.attach(x[i], SCALE)
            found[i] = [layer(x[i], own.cuda_stream) for _ in range(20)]
            own.synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        assert len(found[i]) == 20
        assert all(torch.equal(y, z) for outputs in found[i] for y, z in zip(outputs, want[i]))


@pytest.mark.parametrize("T", [1, 70])
def test_a_captured_call_replays(T, device, plugin):
    """Decoding in one buffer, by a graph: each replay moves the state on."""
    x = tensors(Case("captured", T, B=2, H=2, HV=2, K=128, V=128), torch.bfloat16, device)
    layer = plugin.attach(x, SCALE)
    state, o = x.state.clone(), torch.empty_like(x.v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer.enqueue(Inputs(*x[:6], state), o, state, stream())
    state.copy_(x.state)
    wanted = x.state.clone()
    for _ in range(3):
        graph.replay()
        want_o, wanted = layer(Inputs(*x[:6], wanted), stream())
        assert torch.equal(o, want_o) and torch.equal(state, wanted)
