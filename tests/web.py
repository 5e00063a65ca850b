"""onnxruntime-web as a backend of `gdn2 check`: run by `make test-web`, which fetches it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from gdn2_ops import check, cli
from gdn2_ops.export.onnx import export
from gdn2_ops.model import GDN2LM
from gdn2_ops.runtime.hard_feeds import fixed_shapes
from gdn2_ops.runtime.onnxruntime_web import OnnxRuntimeWeb
from gdn2_ops.runtime.session import OnnxRuntime

TINY = Path(__file__).parents[1] / "examples" / "models" / "tiny"
NAME = "onnxruntime-web"


@pytest.fixture(scope="module")
def model() -> GDN2LM:
    return GDN2LM.from_pretrained(TINY)


def test_the_tiny_model_is_the_same_there(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check, "TEXT_BYTES", 512)
    file = export(model, tmp_path / "tiny.onnx")
    status = cli.main(["check", str(file), "--model", str(TINY)])
    out = capsys.readouterr().out
    assert status == 0 and "backends agree: torch eager, onnx reference, ONNX Runtime, " in out, out
    assert out.count(f"\n{NAME}  ") == 2 and f"{NAME}." in out.splitlines()[-1]


def test_types_shapes_and_errors_pass_through_the_pipes(model, tmp_path):
    file = export(model, tmp_path / "half.onnx", dtype=torch.float16)
    web, here = OnnxRuntimeWeb(file), OnnxRuntime(file)
    assert web.inputs == here.inputs and web.outputs == here.outputs
    feed = {x.name: np.ones(fixed_shapes(here.inputs, 2, 3)[x.name], x.dtype) for x in here.inputs}
    assert {x.dtype for x in feed.values()} == {np.dtype(name) for name in ("int64", "float16", "float32")}
    for port, got, want in zip(web.outputs, web.run(feed), here.run(feed), strict=True):
        assert got.dtype == want.dtype == port.dtype and got.shape == want.shape
        assert np.abs(got - want).max() <= 1e-2 * max(1.0, np.abs(want).max())
    with pytest.raises(RuntimeError, match=r"'past\.0\.conv' is missing"):
        web.run({"input_ids": feed["input_ids"]})
    assert web.run(feed)[0].shape == (2, 3, 256)  # after an error too


def test_a_file_that_it_refuses_is_an_error(tmp_path):
    (tmp_path / "no.onnx").write_bytes(b"no model")
    with pytest.raises(RuntimeError, match="session"):
        OnnxRuntimeWeb(tmp_path / "no.onnx")
