"""The ONNX file: valid, free of local paths, and the eager numbers in stock ONNX Runtime whatever its body."""

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx_files import one_node, run_in_one_buffer, session
from test_model import HYBRID, SMALL, small

import gdn2_ops
from gdn2_ops.backends import TorchBackend
from gdn2_ops.export.onnx import export
from gdn2_ops.export.onnx_bodies import BODIES, function_body, with_body
from gdn2_ops.export.onnx_schema import DOMAIN, INPUTS, IR_VERSION, OP, OPSET, OUTPUTS, PLUGIN
from gdn2_ops.runtime.session import OnnxRuntimeBackend


@pytest.fixture(scope="module", params=[SMALL, HYBRID], ids=["recurrent", "hybrid"])
def exported(request, tmp_path_factory):
    model, file = small(request.param), tmp_path_factory.mktemp("onnx") / "model.onnx"
    assert export(model, file) == file
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


@pytest.mark.parametrize("body", BODIES)
def test_stock_onnxruntime_gives_the_eager_numbers(body, exported, tmp_path):
    model, file = exported
    onnx.save(with_body(onnx.load(file), function_body(body)), tmp_path / "model.onnx")
    assert_eager_numbers(model, OnnxRuntimeBackend(tmp_path / "model.onnx", threads=1))


def test_our_kernels_give_the_eager_numbers(exported):
    model, file = exported
    assert_eager_numbers(model, OnnxRuntimeBackend(file, threads=1, library=True))


@pytest.mark.parametrize("T", [1, 512])
def test_our_kernels_give_the_numbers_of_the_body(T, exported):
    """Each output within 2e-6 of its largest number: logits and states, from an empty state and from that one."""
    model, file = exported
    sessions = [OnnxRuntimeBackend(file, threads=1, library=library) for library in (False, True)]
    rows = np.random.default_rng(T).integers(0, model.config.vocab_size, (2, T))
    states = [None, None]
    for _ in range(2):
        results = [session(rows, state) for session, state in zip(sessions, states)]
        states = [state for _, state in results]
        (want, *wants), (got, *gots) = ([logits, *state] for logits, state in results)
        for y, z in zip((got, *gots), (want, *wants), strict=True):
            assert np.abs(y - z).max() <= 2e-6 * np.abs(z).max()


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
    assert {o.domain: o.version for o in model.opset_import} == {"": OPSET, DOMAIN: 1}
    content = file.read_bytes()
    for path in (str(Path(gdn2_ops.__file__).parents[1]), sys.prefix, ".py", "site-packages", str(Path.home()) + "/"):
        assert path.encode() not in content, path


@pytest.mark.parametrize("library", [False, True])
def test_states_may_be_updated_in_place(exported, library):
    model, file = exported
    run = session(str(file), library=library)
    states = {x.name: x.name.replace("past", "present") for x in run.get_inputs()[1:]}
    random = np.random.default_rng(0)
    for T in (1, 17):
        x = {"input_ids": random.integers(0, model.config.vocab_size, (3, T))}
        for y in run.get_inputs()[1:]:
            shape = (3, *y.shape[1:])
            x[y.name] = random.normal(size=shape).astype(np.float32) if len(shape) > 1 else np.array([0, 2, 6])
        got = run_in_one_buffer(run, x, states)
        for name, want in zip(got, run.run(None, x)):
            assert np.array_equal(got[name], want), (name, T)


def test_what_a_reader_of_the_file_sees(exported):
    _, file = exported
    model = onnx.load(file)
    assert model.graph.name == "GDN2LM" and model.producer_name == "gdn2-ops" and "function body" in model.doc_string
    nodes = {node.name: node for node in model.graph.node}
    assert len(nodes) == len(model.graph.node)
    assert "S_t = " in nodes["layers.0.mixer/GatedDeltaNet2"].doc_string
    weights = {x.name: x.dims for x in model.graph.initializer}
    assert weights["layers.0.mixer.q_proj.weight.T"] == [32, 16] and weights["embed.weight"] == [64, 32]
    shapes = {x.name: [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] for x in model.graph.input}
    assert shapes["input_ids"] == ["batch", "sequence"] and shapes["past.0.recurrent"] == ["batch", 4, 8, 8]
    assert [x.name for x in model.graph.output][:3] == ["logits", "present.0.conv", "present.0.recurrent"]
    assert {x.key for x in model.metadata_props} == {"gdn2.body", "gdn2.module"}
    assert "present.0.conv" in model.graph.input[1].doc_string


def test_a_file_of_another_kind_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="gdn2 export"):
        OnnxRuntimeBackend(tmp_path / "none.onnx")
    onnx.save(one_node("scan"), tmp_path / "node.onnx")
    with pytest.raises(ValueError, match="expected input_ids"):
        OnnxRuntimeBackend(tmp_path / "node.onnx")
