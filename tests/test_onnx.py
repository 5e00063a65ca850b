"""The ONNX file: valid, free of local paths, and the eager numbers in stock ONNX Runtime whatever its body."""

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from cases import CASES, inputs
from test_model import HYBRID, SMALL, small

import gdn2_ops
from gdn2_ops import reference
from gdn2_ops.backends import TorchBackend
from gdn2_ops.export.onnx import attach_body, export, translation_table
from gdn2_ops.export.onnx_bodies import BODIES, CONTRIB, function_body
from gdn2_ops.export.onnx_schema import DOMAIN, INPUTS, IR_VERSION, OP, OPSET, OUTPUTS, PLUGIN, register_schema
from gdn2_ops.runtime.session import OnnxRuntimeBackend

ONE_NODE_CASES = [case for case in CASES if case.cu_seqlens is None and case.T > 0]


@pytest.fixture(scope="module", params=[(c, b) for c in ("recurrent", "hybrid") for b in BODIES], ids="-".join)
def exported(request, tmp_path_factory):
    config, body = request.param
    model = small(SMALL if config == "recurrent" else HYBRID)
    file = tmp_path_factory.mktemp("onnx") / "model.onnx"
    assert export(model, file, body=body) == file
    return model, file


def assert_eager_numbers(model, backend) -> None:
    """Prefill and one decoding step, over batches and lengths."""
    eager = TorchBackend(model)
    for B in (1, 3):
        for T in (1, 63, 300):
            rows = np.random.default_rng(T).integers(0, model.config.vocab_size, (B, T))
            (want, want_state), (got, got_state) = eager(rows, None), backend(rows, None)
            assert np.abs(got - want).max() < 1e-4
            token = rows[:, :1]
            assert np.abs(backend(token, got_state)[0] - eager(token, want_state)[0]).max() < 1e-4


def test_stock_onnxruntime_gives_the_eager_numbers(exported):
    model, file = exported
    assert_eager_numbers(model, OnnxRuntimeBackend(file, threads=1))


def test_the_file_is_valid_and_names_no_local_path(exported):
    _, file = exported
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    assert nodes and {node.op_type for node in nodes} == {OP}
    for node in nodes:
        assert len(node.input) == len(INPUTS) and all(node.input)
        assert len(node.output) == len(OUTPUTS) and all(node.output)
        assert {a.name for a in node.attribute} == {"scale", *PLUGIN}
    assert [f.name for f in model.functions] == [OP]
    assert model.ir_version == IR_VERSION
    opsets = {o.domain: o.version for o in model.opset_import}
    assert opsets.pop(CONTRIB, 1) == 1 and opsets == {"": OPSET, DOMAIN: 1}
    content = file.read_bytes()
    for path in (str(Path(gdn2_ops.__file__).parents[1]), sys.prefix, ".py", "site-packages", str(Path.home()) + "/"):
        assert path.encode() not in content, path


def one_node(body: str, heads: int = 2) -> onnx.ModelProto:
    """A model of nothing but the node, every axis dynamic."""
    axes = dict.fromkeys("qkgb", "B T H K") | dict.fromkeys("vwo", "B T HV V")
    axes |= dict.fromkeys(("initial_state", "final_state"), "B HV K V")
    value = {
        name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, axes[name].split()) for name in axes
    }
    node = onnx.helper.make_node(OP, INPUTS, OUTPUTS, domain=DOMAIN, scale=0.5, **PLUGIN)
    graph = onnx.helper.make_graph([node], "one", [value[n] for n in INPUTS], [value[n] for n in OUTPUTS])
    function = function_body(body, heads)
    opsets = [onnx.helper.make_opsetid(DOMAIN, 1), *function.opset_import]
    return onnx.helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=IR_VERSION)


@pytest.mark.parametrize("body", BODIES)
def test_bodies_are_the_recurrence_on_hard_data(body):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = {}
    for heads in {case.H for case in ONE_NODE_CASES}:
        model = one_node(body, heads)
        onnx.checker.check_model(model, full_check=True)
        sessions[heads] = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    for case in ONE_NODE_CASES:
        x = inputs(case, torch.float64)
        o, state = reference.recurrent(*x, scale=0.5)
        start = torch.zeros(state.shape) if x.state is None else x.state
        feed = {name: y.float().numpy() for name, y in zip(INPUTS, (*x[:6], start))}
        got_o, got_state = sessions[case.H].run(None, feed)
        for got, want in ((got_o, o), (got_state, state)):
            assert np.abs(got - want.numpy()).max() <= 2e-4 * max(1.0, float(want.abs().max())), case


def test_step_and_missing_state_export_through_the_translation_table():
    class Two(torch.nn.Module):
        def forward(self, q, k, v, g, b, w, state):
            o, end = gdn2_ops.chunk(q, k, v, g, b, w)
            token, last = gdn2_ops.step(*(x[:, 0] for x in (q, k, v, g, b, w)), state)
            return o, end, token, last

    torch.manual_seed(0)
    B, T, H, K = 2, 5, 2, 4
    q, k, v, b, w = (torch.rand(B, T, H, K) for _ in range(5))
    arguments = (q, k, v, -torch.rand(B, T, H, K), b, w, torch.randn(B, H, K, K))
    program = torch.onnx.export(
        Two(), arguments, dynamo=True, verbose=False, opset_version=OPSET, custom_translation_table=translation_table()
    )
    attach_body(program.model, "scan")
    for got, want in zip(program(*arguments), Two()(*arguments), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_what_a_graph_cannot_hold_is_refused(tmp_path):
    class InPlace(torch.nn.Module):
        def forward(self, q, k, v, g, b, w, state):
            return gdn2_ops.step_inplace(q, k, v, g, b, w, state)

    token = (torch.rand(2, 1, 4),) * 6
    with pytest.raises(Exception, match="step_inplace"):
        torch.onnx.export(
            InPlace(),
            (*(x.clone() for x in token), torch.zeros(2, 1, 4, 4)),
            dynamo=True,
            verbose=False,
            custom_translation_table=translation_table(),
        )
    with pytest.raises(ValueError, match="body in"):
        export(small(), tmp_path / "m.onnx", body="loop")
    with pytest.raises(ValueError, match="evaluation mode"):
        export(small().train(), tmp_path / "m.onnx")


def test_registered_schema_rejects_an_unknown_attribute():
    register_schema()
    register_schema()
    model = one_node("scan")
    onnx.checker.check_model(model, full_check=True)
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("window", 3))
    with pytest.raises(onnx.checker.ValidationError, match="window"):
        onnx.checker.check_model(model)


def test_a_file_of_another_kind_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="gdn2 export"):
        OnnxRuntimeBackend(tmp_path / "none.onnx")
    onnx.save(one_node("scan"), tmp_path / "node.onnx")
    with pytest.raises(ValueError, match="expected input_ids"):
        OnnxRuntimeBackend(tmp_path / "node.onnx")
