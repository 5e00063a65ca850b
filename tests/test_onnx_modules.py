"""Any module that calls the operators exports; what a graph cannot hold is refused with a way out."""

from typing import NamedTuple

import numpy as np
import onnx
import pytest
import torch
from onnx_files import session
from test_model import HYBRID, small

import gdn2_ops
from gdn2_ops import gates
from gdn2_ops.export.onnx import attach_body, export, translation_table
from gdn2_ops.export.onnx_bodies import BODIES
from gdn2_ops.export.onnx_schema import DOMAIN, OP, OPSET
from gdn2_ops.export.program import flatten_module

B, T, H, K = 2, 5, 2, 8
SIX = "qkvgbw"


class Mixed(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor
    token: torch.Tensor
    state: torch.Tensor | None
    nothing: None = None


class Twice(torch.nn.Module):
    """Shared inputs, two numbers of heads, a state that is given, one that is not, and outputs that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(K, K)

    def forward(self, q, k, v, g, b, w, states, scale=None, keep=True):
        first, state = gdn2_ops.chunk(q, k, v, g, b, w, states[0], scale=scale)
        second, _ = gdn2_ops.chunk(*(x.flatten(2).unsqueeze(2) for x in (q, k, v, g, b, w)))
        _, empty = gdn2_ops.chunk(q, k, v, g, b, w)
        token, _ = gdn2_ops.step(*(x[:, -1] for x in (q, k, v, g, b, w)), states[1] + empty)
        return Mixed(self.proj(first), second, token, state if keep else None)


def arguments(batch: int = B, tokens: int = T) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(tokens)
    q, k, v, g, b, w = (torch.rand(batch, tokens, H, K, generator=random) for _ in SIX)
    return q, k / k.norm(dim=-1, keepdim=True), v, -0.1 * g, b, w


def states(batch: int = B) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(batch, H, K, K), torch.rand(batch, H, K, K)


DYNAMIC = {name: {0: "batch", 1: "time"} for name in SIX} | {f"states.{i}": {0: "batch"} for i in (0, 1)}


@pytest.fixture(scope="module", params=BODIES)
def twice(request, tmp_path_factory):
    module, file = Twice().eval(), tmp_path_factory.mktemp("onnx") / "twice.onnx"
    q, _, _, g, *_ = arguments()
    one = states()[0]
    return module, export(module, file, (q, q, q, g, q, q, (one, one), None), body=request.param, dynamic=DYNAMIC)


def test_two_calls_with_shared_inputs(twice):
    module, file = twice
    assert [len(onnx.load(file).functions)] == [1]
    for run in (session(str(file)), session(str(file), library=True)):
        assert [x.name for x in run.get_inputs()] == [*SIX, "states.0", "states.1"]
        assert [x.name for x in run.get_outputs()] == ["first", "second", "token", "state"]
        for batch, tokens in ((1, 1), (3, 40)):
            x, s = arguments(batch, tokens), states(batch)
            want = module(*x, s)
            got = run.run(None, {i.name: y.numpy() for i, y in zip(run.get_inputs(), (*x, *s))})
            for y, z in zip(got, want):
                assert np.abs(y - z.detach().numpy()).max() < 2e-6


def test_names_of_inputs_and_outputs():
    module = Twice().eval()
    args = (*arguments(), states(), 0.5, False)
    assert flatten_module(module, args).output_names == ["first", "second", "token"]
    flat = flatten_module(module, args, input_names=list("abcdefgh"), output_names=["x", "y", "z"])
    assert flat.input_names == list("abcdefgh") and flat.output_names == ["x", "y", "z"]
    assert [tuple(x.shape) for x in flat.module(*flat.args)] == [(B, T, H, K), (B, T, 1, H * K), (B, H, K)]

    class Rest(torch.nn.Module):
        def forward(self, state, *rest):
            return {"state": state + 1, "sum": sum(rest)}, state

    flat = flatten_module(Rest(), (torch.ones(1), torch.ones(1), torch.ones(1)))
    assert flat.input_names == ["state", "rest_0", "rest_1"]
    assert flat.output_names == ["output_0.state", "output_0.sum", "output_1"]
    assert flatten_module(torch.nn.ReLU(), (torch.ones(1),)).output_names == ["output"]


@pytest.mark.parametrize(
    "options, text",
    [
        ({"args": (object(),)}, "containers of them as arguments, got object"),
        ({"args": (torch.ones(1),) * 3}, "expected at most 2 args, those of Sum.forward, got 3"),
        ({"input_names": ["x"]}, r"expected 2 distinct input names, one per tensor like \['x', 'y'\], got \['x'\]"),
        ({"output_names": ["a", "b"]}, "expected 1 distinct output names"),
        ({"output_names": ["x"]}, r"other names for outputs than for inputs, got \['x'\]"),
        ({"dynamic": {"z": {0: "batch"}}}, r"dynamic to name inputs among \['x', 'y'\], got \['z'\]"),
        ({"dynamic": {"x": {2: "batch"}}}, r"axes of x in 0..0 in dynamic, got \[2\]"),
    ],
)
def test_bad_descriptions_of_a_module_are_refused(options, text):
    class Sum(torch.nn.Module):
        def forward(self, x, y):
            return x + y

    with pytest.raises((ValueError, TypeError), match=text):
        flatten_module(Sum(), **({"args": (torch.ones(1), torch.ones(1))} | options))


class Calls(torch.nn.Module):
    """A module of one function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *x):
        return self.function(*x)


CU_SEQLENS = torch.tensor([0, 2, T])
REFUSED = {
    "a mutation": (
        lambda *x: gdn2_ops.step_inplace(*(y[:, 0] for y in x[:6]), x[6].clone()),
        "got gdn2::step_inplace; use gdn2_ops.step",
    ),
    "packed sequences": (
        lambda *x: gdn2_ops.chunk(*(y[:1] for y in x[:6]), cu_seqlens=CU_SEQLENS),
        "got packed sequences; export with one sequence per batch row",
    ),
    "no operator": (lambda *x: x[0] + 1, "calls gdn2_ops.chunk or gdn2_ops.step, got no gdn2::GatedDeltaNet2 node"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_graph_cannot_hold_is_refused(what, tmp_path):
    function, text = REFUSED[what]
    with pytest.raises((ValueError, NotImplementedError), match=text):
        export(Calls(function).eval(), tmp_path / "m.onnx", (*arguments(), states()[0]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, text",
    [
        ({"body": "loop"}, "body in"),
        ({"opset": 17}, r"an opset in 18..25, got 17"),
        ({"dtype": torch.float64}, "dtype float32, float16 or bfloat16, got torch.float64"),
        ({"dynamic": {}}, "expected args with dynamic"),
    ],
)
def test_bad_options_are_refused(options, text, tmp_path):
    with pytest.raises((ValueError, TypeError), match=text):
        export(small(), tmp_path / "m.onnx", **options)
    with pytest.raises(ValueError, match="evaluation mode"):
        export(small(HYBRID).train(), tmp_path / "m.onnx")


def test_tied_gates_are_linear_attention(tmp_path):
    """KDA, with beta down to zero, in the contrib operator."""

    def kda(q, k, v, g, beta):
        return gdn2_ops.chunk(q, k, v, *gates.kda(k, v, g, beta))

    q, k, v, g, *_ = arguments(2, 40)
    beta = torch.rand(2, 40, H).masked_fill_(torch.rand(2, 40, H) < 0.3, 0)
    file = export(Calls(kda).eval(), tmp_path / "kda.onnx", (q, k, v, g, beta), body="linear_attention")
    run = session(str(file))
    got = run.run(None, {i.name: y.numpy() for i, y in zip(run.get_inputs(), (q, k, v, g, beta))})
    for y, z in zip(got, kda(q, k, v, g, beta)):
        assert np.abs(y - z.numpy()).max() < 2e-6


def test_a_file_without_a_body_needs_our_kernels(tmp_path):
    file = export(Calls(gdn2_ops.chunk).eval(), tmp_path / "m.onnx", arguments(), body="none")
    assert not onnx.load(file).functions
    with pytest.raises(Exception, match="GatedDeltaNet2"):
        session(str(file))
    run = session(str(file), library=True)
    got = run.run(None, {i.name: y.numpy() for i, y in zip(run.get_inputs(), arguments())})
    for y, z in zip(got, gdn2_ops.chunk(*arguments())):
        assert np.abs(y - z.numpy()).max() < 2e-6


def test_the_translation_table_serves_callers_of_the_exporter():
    module, args = Twice().eval(), (*arguments(), states())
    program = torch.onnx.export(
        module, args, dynamo=True, verbose=False, opset_version=OPSET, custom_translation_table=translation_table()
    )
    attach_body(program.model, "scan")
    assert sum((node.domain, node.op_type) == (DOMAIN, OP) for node in program.model.graph) == 4
    for got, want in zip(program(*args), module(*args)):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_softplus_is_exact_where_it_might_overflow(dtype, beta, tmp_path):
    class Decays(torch.nn.Module):
        def forward(self, q, k, v, g, b, w, x):
            return gdn2_ops.chunk(q, k, v, g, b, w)[0], torch.nn.functional.softplus(x, beta=beta)

    x = torch.linspace(-100, 100, 401).to(dtype)
    file = export(Decays().eval(), tmp_path / "m.onnx", (*arguments(), x), body="scan")
    assert "Softplus" not in {node.op_type for node in onnx.load(file).graph.node}
    run = session(str(file))
    _, got = run.run(None, {i.name: y.numpy() for i, y in zip(run.get_inputs(), (*arguments(), x))})
    want = torch.nn.functional.softplus(x, beta=beta)
    torch.testing.assert_close(torch.from_numpy(got), want, rtol=2e-7 if dtype == torch.float32 else 1e-3, atol=1e-6)
