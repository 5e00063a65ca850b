"""torch.export, strict and not: operator nodes, any batch, length and number of sequences; saved, loaded, run."""

import io
from collections.abc import Sequence

import pytest
import torch
from test_compile import arguments, packed
from test_compile import tokens as token_arguments
from test_model import HYBRID, SMALL, small, tokens
from torch.export.graph_signature import OutputKind
from torch.utils._pytree import tree_leaves

import gdn2_ops
from gdn2_ops.decoder import Decoder
from gdn2_ops.export.program import flatten_language_model

every_strictness = pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
every_model = pytest.mark.parametrize("config", [SMALL, HYBRID], ids=["recurrent", "hybrid"])


class Prefill(torch.nn.Module):
    def forward(self, q, k, v, g, b, w, state):
        return tuple(gdn2_ops.chunk(q, k, v, g, b, w, state))


class Packed(torch.nn.Module):
    def forward(self, q, k, v, g, b, w, state, cu_seqlens):
        return tuple(gdn2_ops.chunk(q, k, v, g, b, w, state, cu_seqlens=cu_seqlens))


class Score(torch.nn.Module):
    def forward(self, q, k, v, g, b, w):
        return gdn2_ops.chunk(q, k, v, g, b, w).o


class Decode(torch.nn.Module):
    def forward(self, q, k, v, g, b, w, state):
        return tuple(gdn2_ops.step(q, k, v, g, b, w, state))


class DecodeInPlace(torch.nn.Module):
    def forward(self, q, k, v, g, b, w, state):
        return gdn2_ops.step_inplace(q, k, v, g, b, w, state)


def reloaded(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def exported(module: torch.nn.Module, example: Sequence[torch.Tensor], strict: bool, *axes: str):
    """The program, saved and loaded, with a dynamic dimension for every name in axes, the leading axes of all rows."""
    dims = [torch.export.Dim(axis, min=1) for axis in axes]
    shapes = (*(dict(enumerate(dims)),) * 6, {0: dims[0]})[: len(example)]
    return reloaded(torch.export.export(module, tuple(example), dynamic_shapes=shapes, strict=strict))


def calls(program: torch.export.ExportedProgram) -> list:
    return [node.target for node in program.graph.nodes if node.op == "call_function" and "gdn2" in str(node.target)]


@every_strictness
def test_chunk(strict):
    program = exported(Prefill(), arguments(5), strict, "batch", "tokens")
    assert calls(program) == [torch.ops.gdn2.chunk.default]
    for B, T in ((2, 5), (1, 1), (3, 1), (1, 64), (2, 130)):
        for y, z in zip(program.module()(*arguments(T, B)), Prefill()(*arguments(T, B))):
            assert torch.equal(y, z)


@every_strictness
def test_chunk_without_a_state(strict):
    program = exported(Score(), arguments(5)[:6], strict, "batch", "tokens")
    assert calls(program) == [torch.ops.gdn2.chunk.default]
    for T in (1, 17, 65):
        x = arguments(T, 3)[:6]
        assert torch.equal(program.module()(*x), Score()(*x))


@every_strictness
def test_packed_sequences(strict):
    """Any length of the row and any number of sequences in it, empty ones too."""
    T, N = torch.export.Dim("tokens", min=1), torch.export.Dim("sequences", min=1)
    shapes = (*({1: T},) * 6, {0: N}, {0: N + 1})
    program = reloaded(torch.export.export(Packed(), tuple(packed((0, 7, 12))), dynamic_shapes=shapes, strict=strict))
    assert calls(program) == [torch.ops.gdn2.chunk.default]
    for cu_seqlens in ((0, 7, 12), (0, 1), (0, 0, 20, 20, 31), (0, 64, 130)):
        x = packed(cu_seqlens)
        for y, z in zip(program.module()(*x), Packed()(*x)):
            assert torch.equal(y, z)


@every_strictness
def test_step(strict):
    program = exported(Decode(), token_arguments(2), strict, "batch")
    assert calls(program) == [torch.ops.gdn2.step.default]
    for B in (1, 2, 5):
        for y, z in zip(program.module()(*token_arguments(B)), Decode()(*token_arguments(B))):
            assert torch.equal(y, z)


@every_strictness
def test_step_inplace(strict):
    program = exported(DecodeInPlace(), token_arguments(2), strict, "batch")
    assert calls(program) == [torch.ops.gdn2.step_inplace.default]
    functional = program.run_decompositions({})
    kinds = [x.kind for x in functional.graph_signature.output_specs]
    assert kinds == [OutputKind.USER_INPUT_MUTATION, OutputKind.USER_OUTPUT]
    for B in (1, 2, 5):
        for run in (program.module(), functional.module()):
            x, y = token_arguments(B), token_arguments(B)
            assert torch.equal(run(*x), DecodeInPlace()(*y))
            assert torch.equal(x[6], y[6]) and not torch.equal(x[6], token_arguments(B)[6])


@every_strictness
@every_model
def test_one_program_serves_every_batch_and_length(config, strict):
    model = small(config)
    program = flatten_language_model(model).exported(strict=strict)
    nodes = [node for node in program.graph.nodes if node.target is torch.ops.gdn2.chunk.default]
    assert len(nodes) == sum(hasattr(state, "recurrent") for state in model.initial_state(1))
    for B, T in ((1, 1), (3, 63), (2, 130)):
        rows = tokens(B, T)
        logits, state = model(rows)
        got, *past = program.module()(rows, *tree_leaves(model.initial_state(B)))
        torch.testing.assert_close(got, logits, rtol=1e-4, atol=1e-5)
        more = tokens(B, 5)
        torch.testing.assert_close(program.module()(more, *past)[0], model(more, state).logits, rtol=1e-4, atol=1e-5)


@every_strictness
@every_model
def test_a_decode_step_with_its_state_as_buffers(config, strict):
    """The state is in the program: saved with it, overwritten by every call."""
    model = small(config)
    decoder, eager, rows = Decoder(model, 2), Decoder(model, 2), tokens(2, 20)
    with torch.no_grad():  # else the program has a region without gradients, which decompositions do not enter
        program = torch.export.export(decoder, (rows[:, 0],), strict=strict)
        functional = program.run_decompositions({})
        names = {name for name, _ in decoder.named_buffers(recurse=False)}
        assert set(functional.graph_signature.buffers_to_mutate.values()) == names
        runs = [reloaded(program).module(), functional.module()]
        for token in rows.unbind(1):
            want = eager(token)
            for run in runs:
                torch.testing.assert_close(run(token), want, rtol=1e-4, atol=1e-5)


def test_names_follow_the_template():
    flat = flatten_language_model(small(HYBRID), state_names="{field}_{layer}_{when}")
    assert flat.input_names == ["input_ids", "conv_0_past", "recurrent_0_past", "k_1_past", "v_1_past", "length_1_past"]
    assert flat.output_names == [
        "logits",
        "conv_0_present",
        "recurrent_0_present",
        "k_1_present",
        "v_1_present",
        "length_1_present",
    ]


def test_a_module_without_state_is_refused():
    with pytest.raises(TypeError, match="initial_state"):
        flatten_language_model(torch.nn.Linear(2, 2))
