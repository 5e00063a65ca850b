"""`gdn2 check`: the tiny model is the same everywhere, and a file that is wrong is found out."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx_files import one_node

from gdn2_ops import check, cli
from gdn2_ops.export.onnx import export
from gdn2_ops.export.onnx_bodies import BODIES, float64_body, function_body, with_body
from gdn2_ops.export.onnx_schema import DOMAIN, INPUTS, OP, OPSET
from gdn2_ops.model import GDN2LM
from gdn2_ops.runtime import onnxruntime_web
from gdn2_ops.runtime.hard_feeds import hard_feeds
from gdn2_ops.runtime.onnx_reference import OnnxReference
from gdn2_ops.runtime.session import OnnxRuntime, open_session

TINY = Path(__file__).parents[1] / "examples" / "models" / "tiny"
WRONG = onnx.parser.parse_function(
    f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]> {OP} <scale, plugin_namespace, plugin_version> '
    f"({', '.join(INPUTS)}) => (o, final_state) {{ o = Identity (v) final_state = Identity (initial_state) }}"
)
WITHOUT_NODES = helper.make_model(
    helper.make_graph(
        [helper.make_node("Neg", ["x"], ["y"])],
        "none",
        *([helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])] for name in "xy"),
    )
)


@pytest.fixture(autouse=True)
def what_few_have(monkeypatch):
    """TensorRT-RTX, whose builds take seconds, and onnxruntime-web, which has tests of its own."""
    monkeypatch.setitem(__import__("sys").modules, "tensorrt_rtx", None)
    monkeypatch.setattr(onnxruntime_web, "FOLDERS", ())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return export(GDN2LM.from_pretrained(TINY), tmp_path_factory.mktemp("onnx") / "tiny.onnx")


def test_the_tiny_model_is_the_same_everywhere(tiny, monkeypatch, capsys):
    monkeypatch.setattr(check, "TEXT_BYTES", 2048)
    bodies = [x for body in BODIES for x in ("--body", body)]
    status = cli.main(["check", str(tiny), "--model", str(TINY), *bodies])
    out = capsys.readouterr().out
    assert status == 0, out
    assert "float32, 4 gdn2::GatedDeltaNet2 nodes" in out
    assert "All 7 backends agree: torch eager, onnx reference, ONNX Runtime, ONNX Runtime + library, " in out
    assert "text: 2,048 bytes of held-out modules, 128 bytes generated" in out
    assert "text: 256 bytes of held-out modules, 16 bytes generated" in out
    assert "pip install tensorrt_rtx" in out and "npm install onnxruntime-web" in out
    assert out.count("not found: ONNX Runtime on CUDA") == 2 and "pip install onnxruntime-gpu" in out
    for body in BODIES:
        assert out.count(f"ONNX Runtime, body {body} ") == 2


def test_no_session_on_cuda_is_one_on_the_cpu(monkeypatch):
    """Where ONNX Runtime has no CUDA, and where it has and cannot use it, which it only warns of."""
    file = one_node("scan").SerializeToString()
    has = ["CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: has)
    with pytest.raises(ImportError, match="pip install onnxruntime-gpu"):
        open_session(file, cuda=True)
    has.append("CUDAExecutionProvider")
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="expected a session on CUDA, got one on the CPU"):
        open_session(file, cuda=True)


def test_a_wrong_body_is_found_out_and_our_kernels_are_right(tmp_path, capsys):
    """A file of a user's own, without weights."""
    onnx.save(one_node(WRONG), tmp_path / "node.onnx")
    assert cli.main(["check", str(tmp_path / "node.onnx"), "--body", "linear_attention"]) == 1
    lines = capsys.readouterr().out.splitlines()
    (ours,) = (line for line in lines if line.startswith("ONNX Runtime + library  "))
    assert float(ours.split()[4]) < 5e-6
    wrong = [line for line in lines if "differs from onnx, nodes in float64 by" in line]
    assert [line.split(":")[0] for line in wrong] == ["onnx reference", "ONNX Runtime"]


@pytest.mark.parametrize("body", BODIES)
def test_bodies_agree_on_hard_feeds(body):
    model = one_node(body, H=2, HV=4, K=16, V=12)
    truth, run = OnnxReference(with_body(model, float64_body())), OnnxRuntime(model.SerializeToString())
    feeds = [feed for feed in hard_feeds(model, truth.inputs) if feed.tokens <= 65]
    row = check.hard_row(body, run, feeds, [truth.run(feed.inputs) for feed in feeds])
    assert 0 < row.worst <= 5e-6 and row.at in [feed.name for feed in feeds]
    assert {(feed.batch, feed.tokens) for feed in feeds} >= {(1, 1), (3, 16), (3, 65)}


def test_hard_feeds_are_hard_and_the_same_every_time():
    model = one_node("scan", H=2, HV=4, K=16, V=12)
    ports = OnnxReference(model).inputs
    feeds, again = list(hard_feeds(model, ports)), list(hard_feeds(model, ports))
    assert all(np.array_equal(x, again[i].inputs[name]) for i, f in enumerate(feeds) for name, x in f.inputs.items())
    assert min(f.inputs["g"].min() for f in feeds) < -20 and any(not f.inputs["g"].any() for f in feeds)
    assert all(f.inputs["g"].max() <= 0 for f in feeds)
    assert {float(x) for f in feeds for x in (f.inputs["b"].min(), f.inputs["b"].max())} >= {0.0, 1.0, 2.0}
    assert all(np.allclose(np.linalg.norm(f.inputs["k"], axis=-1), 1, atol=1e-5) for f in feeds)


def test_rows_of_a_table_are_within_it(tiny):
    model = onnx.load(tiny)
    feeds = list(hard_feeds(model, OnnxReference(model).inputs))
    rows = np.concatenate([f.inputs["input_ids"].ravel() for f in feeds])
    assert rows.min() >= 0 and 200 < rows.max() < 256
    assert any(f.tokens > 1 and (f.inputs["input_ids"] == f.inputs["input_ids"][:, :1]).all() for f in feeds)


def test_no_number_and_no_result_are_disagreements():
    class Broken:
        inputs = outputs = ()

        def run(self, feed):
            return [np.full(3, np.nan, np.float32)]

    class Failing(Broken):
        def run(self, feed):
            raise RuntimeError("no memory\nat all")

    model = one_node("scan", H=1, HV=1, K=4, V=4)
    feeds = list(hard_feeds(model, OnnxReference(model).inputs))[:2]
    assert check.hard_row("broken", Broken(), feeds, [[np.ones(3)]] * 2).worst == np.inf
    failed = check.hard_row("failing", Failing(), feeds, [[np.ones(3)]] * 2)
    assert failed.worst == np.inf and failed.at.endswith("weak decay, uniform erase, random keys: no memory")


def test_what_cannot_be_checked_exits_with_2(tmp_path, capsys):
    (tmp_path / "text.onnx").write_text("no model")
    onnx.save(WITHOUT_NODES, tmp_path / "other.onnx")
    onnx.save(one_node("scan", H=1, HV=1, K=4, V=4), tmp_path / "node.onnx")
    for arguments, text in (
        (["none.onnx"], "expected an ONNX file"),
        (["text.onnx"], "expected an ONNX model, got"),
        (["other.onnx"], "expected gdn2::GatedDeltaNet2 nodes, got none"),
        (["node.onnx", "--body", "loop"], "expected a body in"),
        (["node.onnx", "--model", str(TINY)], "expected the model's inputs"),
    ):
        assert cli.main(["check", str(tmp_path / arguments[0]), *arguments[1:]]) == 2
        assert text in capsys.readouterr().err


def test_what_a_backend_cannot_run_is_said(tmp_path, capsys):
    onnx.save(with_body(one_node("scan"), function_body("linear_attention")), tmp_path / "m.onnx")
    assert cli.main(["check", str(tmp_path / "m.onnx")]) == 0
    out = capsys.readouterr().out
    assert "not run: onnx reference: expected standard operators, got com.microsoft::LinearAttention" in out
    assert "All 2 backends agree: ONNX Runtime, ONNX Runtime + library." in out
