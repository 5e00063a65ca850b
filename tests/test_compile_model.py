"""torch.compile of models: the decode loop overwrites its states in place, regions are compiled once, and checkpointing
with any policy gives the gradients it gives without.
"""

import dataclasses
import re
import time
from functools import partial

import pytest
import torch
from test_model import HYBRID, SMALL, gradients, small, tokens
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from gdn2_ops.decoder import Decoder
from gdn2_ops.model import GDN2LM, GDN2Config

ONE_LAYER = dataclasses.replace(SMALL, num_layers=1)
PROMPT, COUNT = 9, 12


def generated(prefill, step, batch: int = 2) -> torch.Tensor:
    """COUNT tokens, each the most probable after the one before."""
    rows = [prefill(tokens(batch, PROMPT)).argmax(-1)]
    while len(rows) < COUNT:
        rows.append(step(rows[-1]).argmax(-1))
    return torch.stack(rows)


def by_the_functional_step(model: GDN2LM, batch: int = 2) -> torch.Tensor:
    state = None

    def prefill(rows):
        nonlocal state
        logits, state = model.prefill(rows)
        return logits

    def step(token):
        nonlocal state
        logits, state = model.decode(token, state)
        return logits

    return generated(prefill, step, batch)


def state_arguments(code: str, states: list[torch.Tensor]) -> dict[str, list[str]]:
    """Of Inductor's code: for each input whose sizes and strides are a state's, the lines that name it."""
    body = code[code.index("def call(self, args)") :]
    body = body[: body.index("runner = ")]
    shapes = {f"({', '.join(map(str, x.shape))}), ({', '.join(map(str, x.stride()))})" for x in states}
    asserted = re.findall(r"assert_size_stride\((arg\d+_1), (\(.*?\), \(.*?\))", body)
    names = {name for name, shape in asserted if shape in shapes}
    bookkeeping = re.compile(r"args$|assert_size_stride|^\s*del ")
    return {
        name: [x for x in body.splitlines() if re.search(rf"\b{name}\b", x) and not bookkeeping.search(x)]
        for name in names
    }


def assert_recurrent_states_go_to_the_operator_only(code: str, states: list[torch.Tensor]) -> None:
    uses = state_arguments(code, states)
    assert len(uses) == len(states)
    for name, lines in uses.items():
        assert len(lines) == 1 and "torch.ops.gdn2.step_inplace.default(" in lines[0], f"{name}:\n" + "\n".join(lines)
        assert f" {name}, None, " in lines[0]  # itself, no view or copy of it


@pytest.fixture(scope="module", autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("config", [SMALL, HYBRID], ids=["recurrent", "hybrid"])
def test_decoding_in_place_is_decoding(config):
    model = small(config)
    decoder = Decoder(model, 2)
    want = by_the_functional_step(model)
    addresses = [x.data_ptr() for x in decoder.buffers(recurse=False)]
    assert torch.equal(generated(decoder.prefill, decoder), want)
    _, state = model.prefill(tokens(2, PROMPT))
    assert torch.equal(generated(lambda rows: model.prefill(rows)[0], partial(model.decode_inplace, state=state)), want)
    for mine, other in zip(decoder.state, state, strict=True):
        assert all(map(torch.equal, mine, other))
    assert [x.data_ptr() for x in decoder.buffers(recurse=False)] == addresses
    assert not set(decoder.state_dict()) & {name for name, _ in decoder.named_buffers(recurse=False)}
    decoder.reset()
    assert not any(x.any() for x in decoder.buffers(recurse=False))
    with pytest.raises(ValueError, match=r"expected a state of shapes \[\(2, .* of another batch or model"):
        decoder.load(model.initial_state(3))


@pytest.fixture(scope="module")
def compiled_decoder():
    """Inductor's decode loop: the model, both decoders, compiled tokens, generated code, graphs and their breaks."""
    torch._dynamo.reset()
    counters.clear()
    model = small(GDN2Config.preset("tiny"))
    eager, decoder = Decoder(model, 2), Decoder(model, 2)
    step = torch.compile(decoder, fullgraph=True)
    _, (code,) = run_and_get_code(step, tokens(2, 1)[:, 0])
    with torch.compiler.set_stance("fail_on_recompile"):
        found = generated(decoder.prefill, step)
    graphs, breaks = counters["stats"]["unique_graphs"], dict(counters["graph_break"])
    return model, eager, step, found, code, graphs, breaks


def test_the_decode_loop_is_one_graph_and_writes_the_eager_tokens(compiled_decoder):
    model, _, _, found, _, graphs, breaks = compiled_decoder
    assert torch.equal(found, by_the_functional_step(model))
    assert graphs == 1 and not breaks


def test_the_compiled_decode_loop_copies_no_recurrent_state(compiled_decoder):
    model, *_, code, _, _ = compiled_decoder
    states = [layer.recurrent for layer in model.initial_state(2)]
    assert_recurrent_states_go_to_the_operator_only(code, states)
    copied = code.replace("torch.ops.gdn2.step_inplace.default(", "aten.clone(", 1)
    with pytest.raises(AssertionError):
        assert_recurrent_states_go_to_the_operator_only(copied, states)


def test_the_compiled_decode_loop_is_faster_than_eager(compiled_decoder, record_property):
    _, eager, step, *_ = compiled_decoder
    token, best = tokens(2, 1)[:, 0], {eager: 9.0, step: 9.0}
    for _ in range(40):
        for call in best:
            began = time.perf_counter()
            for _ in range(5):
                call(token)
            best[call] = min(best[call], time.perf_counter() - began)
    for name, call in (("eager_us", eager), ("compiled_us", step)):
        record_property(name, f"{best[call] / 5 * 1e6:.0f}")
    assert best[step] < best[eager]


def test_one_decode_graph_serves_every_batch():
    torch._dynamo.reset()
    counters.clear()
    model = small(ONE_LAYER)
    step = torch.compile(model.decode_inplace, fullgraph=True, dynamic=True)
    code = None
    for batch in (5, 2, 3):  # 3, the past of the convolution, would be taken for one size with it
        _, mine = model.prefill(tokens(batch, PROMPT))
        _, other = model.prefill(tokens(batch, PROMPT))
        token = tokens(batch, 1)[:, 0]
        if code is None:
            got, (code,) = run_and_get_code(step, token, mine)
        else:
            with torch.compiler.set_stance("fail_on_recompile"):
                got = step(token, mine)
        torch.testing.assert_close(got, model.decode_inplace(token, other), rtol=1e-4, atol=1e-5)
        for x, y in zip(mine[0], other[0], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    assert "step_inplace.default(" in code and "aten.clone" not in code


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_write_the_eager_tokens(mode):
    """CPU behaviour: reduce-overhead's graphs are CUDA's; on a CPU the mode compiles as the default one does."""
    torch._dynamo.reset()
    model = small(ONE_LAYER)
    decoder = Decoder(model, 2)
    step = torch.compile(decoder, fullgraph=True, mode=mode)
    assert torch.equal(generated(decoder.prefill, step), by_the_functional_step(model))


def test_a_layer_is_compiled_once_for_all():
    """Regional compilation: every block has the same graph, so a deep model compiles one."""
    torch._dynamo.reset()
    counters.clear()
    model, rows = small(dataclasses.replace(SMALL, num_layers=3)).train(), tokens(2, 33)
    want = gradients(model, model, rows)
    for block in model.layers:
        block.compile(fullgraph=True, backend="aot_eager")
    for got, same in zip(gradients(model, model, rows), want):
        torch.testing.assert_close(got, same, rtol=1e-4, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


class CountingChunks(TorchDispatchMode):
    """How often gdn2::chunk runs."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.gdn2.chunk.default
        return func(*args, **(kwargs or {}))


def save_chunks(ctx, op, *args, **kwargs):
    saved = op is torch.ops.gdn2.chunk.default
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def save_matrix_products(ctx, op, *args, **kwargs):
    saved = op is torch.ops.aten.mm.default
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


POLICIES = {"all": (None, 4), "chunk saved": (save_chunks, 2), "products saved": (save_matrix_products, 4)}


class Checkpointed(torch.nn.Module):
    """The model with each block under activation checkpointing."""

    def __init__(self, model: GDN2LM, policy) -> None:
        super().__init__()
        self.model = model
        contexts = partial(create_selective_checkpoint_contexts, policy) if policy else None
        self.options = {"use_reentrant": False} | ({"context_fn": contexts} if contexts else {})

    def forward(self, rows):
        x = self.model.embed(rows)
        for block in self.model.layers:
            x, _ = checkpoint(block, x, **self.options)
        return self.model._logits(x), None

    def gradients(self, forward, rows) -> list[torch.Tensor]:
        logits, _ = forward(rows)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows.flatten())
        return [logits.detach(), *torch.autograd.grad(loss, list(self.model.parameters()))]


@pytest.mark.parametrize("policy, runs", POLICIES.values(), ids=POLICIES)
def test_checkpointing_gives_the_plain_gradients(policy, runs):
    """runs: of gdn2::chunk, forward and backward, in two layers: saved ones do not run again."""
    torch._dynamo.reset()
    model, rows = small(SMALL).train(), tokens(2, 33)
    want = gradients(model, model, rows)
    checkpointed = Checkpointed(model, policy)
    with CountingChunks() as counting:
        got = checkpointed.gradients(checkpointed, rows)
    assert counting.count == runs
    assert all(map(torch.equal, got, want))

    graphs = []

    def keep(graph, example):
        graphs.append(graph)
        return graph.forward

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    compiled = torch.compile(checkpointed, fullgraph=True, backend=backend)
    for x, y in zip(checkpointed.gradients(compiled, rows), want):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
    calls = [node for graph in graphs for node in graph.graph.nodes if node.target is torch.ops.gdn2.chunk.default]
    assert len(graphs) == 2 and len(calls) == runs
