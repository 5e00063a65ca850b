"""torch.compile of the operators: one graph for every length, forward and backward, and the eager numbers.

The sizes of a first call that vary later differ from all others there: the compiler takes equal sizes for one.
"""

import pytest
import torch
from cases import Case, bounds, inputs
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.exc import InductorError
from versions import fails_on

import gdn2_ops

LENGTHS = (7, 64, 65, 300)


def arguments(T: int, B: int = 3, dtype: torch.dtype = torch.float32, **kind) -> list[torch.Tensor]:
    return list(inputs(Case(f"compiled {B} {T}", T, B=B, H=1, HV=2, K=4, V=4, **kind), dtype))


def tokens(B: int) -> list[torch.Tensor]:
    *rows, state = arguments(1, B)
    return [*(x[:, 0] for x in rows), state]


def packed(cu_seqlens: tuple[int, ...]) -> list[torch.Tensor]:
    case = Case("packed", cu_seqlens[-1], H=1, HV=2, K=4, V=4, cu_seqlens=cu_seqlens)
    return [*inputs(case, torch.float32), bounds(case)]


def layer(q, k, v, g, b, w, state, cu_seqlens=None):
    """chunk as a model has it: something to fuse on both sides."""
    o, state = gdn2_ops.chunk(q * 2, k, torch.tanh(v), -g.abs(), b.sigmoid(), w, state, cu_seqlens=cu_seqlens)
    return torch.nn.functional.silu(o).flatten(-2), state


def with_gradients(function, x: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [y.detach().clone().requires_grad_() for y in x]
    outputs = function(*leaves)
    return [*outputs, *torch.autograd.grad(sum(y.square().sum() for y in outputs), leaves)]


def assert_same(got, want):
    assert len(got) == len(want)
    for y, z in zip(got, want):
        torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-5)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def counter():
    return CompileCounterWithBackend("inductor")


def test_training_is_one_graph_for_every_length(counter):
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for T in LENGTHS:
        x = arguments(T)
        assert_same(with_gradients(compiled, x), with_gradients(layer, x))
    assert counter.frame_count == 1
    (op,) = [node for node in counter.graphs[0].graph.nodes if "gdn2" in str(node.target)]
    assert op.target in (torch.ops.gdn2.chunk, torch.ops.gdn2.chunk.default)


@fails_on("2.11", AssertionError, "backed_size_oblivious still compiles a second graph for a size of 1")
@fails_on("2.15", InductorError, "backed_size_oblivious trips an assertion of Inductor on strides; mark_unbacked works")
def test_one_graph_serves_a_single_token_too(counter):
    """Sizes of 1 are constants to the compiler unless it is told not to look; then prefill and decode share a graph."""
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    with torch.fx.experimental._config.patch(backed_size_oblivious=True), torch.no_grad():
        for T in (7, 1, *LENGTHS[1:]):
            assert_same(compiled(*arguments(T)), layer(*arguments(T)))
    assert counter.frame_count == 1


def test_a_single_token_is_one_more_graph_and_no_other():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for T in (7, 1, *LENGTHS, 1):
        assert_same(with_gradients(compiled, arguments(T)), with_gradients(layer, arguments(T)))
    assert counter.frame_count == 2


def test_packed_sequences_are_one_graph():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for cu_seqlens in ((0, 0, 20, 20, 31, 31), (0, 3, 8), (0, 5, 5, 9, 64)):
        x = packed(cu_seqlens)
        assert_same(compiled(*x), layer(*x))
    assert counter.frame_count == 1


def test_step_is_one_graph_for_every_batch(counter):
    def decode(q, k, v, g, b, w, state):
        o, state = gdn2_ops.step(q * 2, k, torch.tanh(v), g, b, w, state)
        return o.flatten(-2) + 1, state

    compiled = torch.compile(decode, backend=counter, fullgraph=True, dynamic=True)
    for B in (3, 2, 8):
        assert_same(with_gradients(compiled, tokens(B)), with_gradients(decode, tokens(B)))
    assert counter.frame_count == 1


def test_step_inplace_is_one_graph_for_every_batch(counter):
    def decode(q, k, v, g, b, w, pool, slots):
        first = gdn2_ops.step_inplace(q, k, v, g, b, w, pool, slots=slots)
        return first + gdn2_ops.step_inplace(q, k, torch.tanh(v), g, b, w, pool, slots=slots)

    compiled = torch.compile(decode, backend=counter, fullgraph=True, dynamic=True)
    for B in (3, 2, 8):
        *rows, state = tokens(B)
        pool, slots = torch.cat((state, -state)), 2 * torch.arange(B).flip(0)
        want_pool = pool.clone()
        want = decode(*rows, want_pool, slots)
        assert_same([compiled(*rows, pool, slots), pool], [want, want_pool])
        assert torch.equal(pool[1::2], torch.cat((state, -state))[1::2])
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_compiles(dtype):
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    x = arguments(33, dtype=dtype)
    for y, z in zip(with_gradients(compiled, x), with_gradients(layer, x)):
        assert y.dtype == z.dtype
        torch.testing.assert_close(y, z)
