"""Files of float16, bfloat16 and int8, and files whose weights are beside them."""

import dataclasses
import re

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from onnx_files import session
from test_model import SMALL, small

import gdn2_ops
from gdn2_ops import check, cli
from gdn2_ops.backends import TorchBackend
from gdn2_ops.export.onnx import export
from gdn2_ops.export.onnx_quantize import quantize_int8
from gdn2_ops.export.onnx_schema import DOMAIN, OP
from gdn2_ops.runtime.onnx_reference import OnnxReference
from gdn2_ops.runtime.runner import LanguageModel
from gdn2_ops.runtime.session import OnnxRuntimeBackend

BYTES = dataclasses.replace(SMALL, vocab_size=256)
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 40))


def nodes(model: onnx.ModelProto, op_type: str, domain: str = "") -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if (node.domain, node.op_type) == (domain, op_type)]


def types(model: onnx.ModelProto) -> dict[str, int]:
    return {x.name: x.type.tensor_type.elem_type for x in (*model.graph.input, *model.graph.output)}


def error(backend) -> float:
    """Of the logits of two chunks of tokens, relative to the largest."""
    eager, largest, found = TorchBackend(small(BYTES)), 0.0, 0.0
    states = [None, None]
    for part in (TOKENS[:, :-1], TOKENS[:, -1:]):
        (want, states[0]), (got, states[1]) = eager(part, states[0]), backend(part, states[1])
        assert got.dtype == np.float32
        largest, found = max(largest, np.abs(want).max()), max(found, np.abs(got - want).max())
    return found / largest


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """float32 with its weights beside it, and 16 bits."""
    folder, model = tmp_path_factory.mktemp("onnx"), small(BYTES)
    before = [x.clone() for x in model.state_dict().values()]
    made = {"float32": export(model, folder / "float32.onnx", external_data=True)}
    for dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        made[name] = export(model, folder / f"{name}.onnx", dtype=dtype)
    assert all(torch.equal(x, y) for x, y in zip(before, model.state_dict().values()))
    return made


@pytest.mark.parametrize("library", [False, True])
def test_float16_in_onnxruntime(files, library):
    model = onnx.load(files["float16"])
    assert types(model)["logits"] == types(model)["past.0.recurrent"] == TensorProto.FLOAT
    assert types(model)["past.0.conv"] == TensorProto.FLOAT16
    assert 0 < error(OnnxRuntimeBackend(files["float16"], library=library)) < 2e-3
    x = OnnxRuntimeBackend(files["float16"], library=library)
    assert [y.dtype for y in x(TOKENS, None)[1]] == [np.float16, np.float32] * 2


def test_bfloat16_in_onnx_itself_while_onnxruntime_has_no_cpu_kernels(files):
    assert types(onnx.load(files["bfloat16"]))["past.0.conv"] == TensorProto.BFLOAT16
    assert 0 < error(LanguageModel(OnnxReference(onnx.load(files["bfloat16"])))) < 2e-2
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
        session(str(files["bfloat16"]))


def test_int8_projections(files, tmp_path):
    file = quantize_int8(files["float32"], tmp_path / "int8.onnx")
    before, after = onnx.load(files["float32"]), onnx.load(file)
    onnx.checker.check_model(str(file), full_check=True)
    assert nodes(before, OP, DOMAIN) == nodes(after, OP, DOMAIN) and before.functions == after.functions
    projections = 13 * SMALL.num_layers + 1
    assert len(nodes(before, "MatMul")) == projections
    assert len(nodes(after, "MatMulInteger")) == projections and not nodes(after, "MatMul")
    assert {x.key: x.value for x in after.metadata_props}["gdn2.quantize"] == "int8"
    assert after.producer_name == "gdn2-ops" and "8 bits" in after.doc_string
    for library in (False, True):
        assert 1e-4 < error(OnnxRuntimeBackend(file, library=library)) < 5e-2
    with pytest.raises(ValueError, match="got 16-bit weights"):
        quantize_int8(files["float16"], tmp_path / "none.onnx")


def test_weights_beside_the_file(files, monkeypatch, capsys):
    file = files["float32"]
    data = file.with_name("float32.onnx.data")
    weights = sum(x.numel() * 4 for x in small(BYTES).parameters())
    assert data.stat().st_size > 0.9 * weights and file.stat().st_size < 80_000
    monkeypatch.setitem(__import__("sys").modules, "tensorrt_rtx", None)
    monkeypatch.setattr(check, "TEXT_BYTES", 1024)
    assert cli.main(["check", str(file), "--body", "scan"]) == 0
    assert "All 4 backends agree" in capsys.readouterr().out


class Wide(torch.nn.Module):
    """The operator and a matrix larger than those that the exporter transposes itself."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(8, 2**18, bias=False)

    def forward(self, *x):
        return self.proj(gdn2_ops.chunk(*x).o)


def test_large_matrices_are_written_transposed(tmp_path, monkeypatch):
    torch.manual_seed(0)
    module, (q, k, v, g, b, w) = Wide().eval(), [torch.rand(1, 3, 1, 8) for _ in range(6)]
    x = (q, k, v, -g, b, w)
    file = export(module, tmp_path / "wide.onnx", x)
    model = onnx.load(file)
    assert not nodes(model, "Transpose")
    assert [list(y.dims) for y in model.graph.initializer if y.name == "proj.weight.T"] == [[8, 2**18]]
    run = session(str(file))
    (got,) = run.run(None, {i.name: y.numpy() for i, y in zip(run.get_inputs(), x)})
    assert np.abs(got - module(*x).detach().numpy()).max() < 1e-5

    def refuse(*args, **options):
        raise onnx.checker.ValidationError("not today")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(onnx.checker.ValidationError, match="not today"):
        export(module, tmp_path / "refused.onnx", x, external_data=True)
    assert list(tmp_path.iterdir()) == [file]


def test_the_command_line_quantizes(tmp_path, capsys):
    small(BYTES).save_pretrained(tmp_path)
    file = tmp_path / "m.onnx"
    command = ["export", str(tmp_path), "--to", "onnx", "-o", str(file), "--quantize", "int8"]
    assert cli.main([*command, "--opset", "22"]) == 0
    assert re.search(r"wrote .*m.onnx \([\d,]+ bytes\)", capsys.readouterr().out)
    model = onnx.load(file)
    assert nodes(model, "MatMulInteger") and model.opset_import[0].version == 22
    assert cli.main([*command, "--dtype", "float16"]) == 2 and "got 16-bit weights" in capsys.readouterr().err
