"""The command line does the main job, says what is wrong, and fails where results differ."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from test_model import SMALL, small

from gdn2_ops import cli, commands, corpus, demo
from gdn2_ops.backends import TorchBackend
from gdn2_ops.model import GDN2LM
from gdn2_ops.runtime.generate import bits_per_byte

TINY = Path(__file__).parents[1] / "examples" / "models" / "tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    small(SMALL.__class__(**(SMALL.__dict__ | {"vocab_size": 256}))).save_pretrained(path)
    return path


def test_export_then_generate_the_same_bytes_from_all(folder, tmp_path, capfdbinary):
    file = tmp_path / "model.onnx"
    assert cli.main(["export", str(folder), "--to", "onnx", "-o", str(file), "--body", "scan"]) == 0
    assert b"wrote" in capfdbinary.readouterr().out and file.stat().st_size > 1000
    written = []
    for model in ([str(folder)], [str(file)], [str(file), "--library"]):
        assert cli.main(["generate", *model, "--prompt", "import ", "--count", "40"]) == 0
        written.append(capfdbinary.readouterr().out)
    assert written[0] == written[1] == written[2] and len(written[0]) == 41


def test_generate_says_when_numbers_run_away(folder, monkeypatch, capfdbinary):
    def backend(tokens, state):
        logits = np.zeros((*tokens.shape, 256), np.float32)
        logits[..., ord("x")] = 1 if (state or 0) < 2 else np.nan
        return logits, (state or 0) + 1

    monkeypatch.setattr(commands, "_backend", lambda *_: backend)
    assert cli.main(["generate", str(folder), "--prompt", "a", "--count", "9"]) == 1
    captured = capfdbinary.readouterr()
    assert captured.out == b"xx" and b"gdn2: error: expected finite logits, got NaN or infinity" in captured.err


def test_info_lists_versions_and_operators(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out and "gdn2::chunk_backward" in out


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["generate", "{}/none"], "expected a model folder with config.json"),
        (["generate", "{}/none.onnx"], "gdn2 export MODEL --to onnx writes one"),
        (["generate", "{model}", "--prompt", ""], "a prompt of at least one byte"),
        (["generate", "{model}", "--library"], "expected an .onnx file with --library or --cuda"),
        (["generate", "{model}", "--cuda"], "expected an .onnx file with --library or --cuda"),
        (["export", "{model}", "--to", "onnx", "-o", "{}/no/such/m.onnx"], "an existing folder to write to"),
        (["export", "{model}", "--to", "onnx", "-o", "{}/m.onnx", "--body", "loop"], "expected a body in"),
        (["demo", "--model", "{}/none"], "expected a model folder with config.json"),
    ],
)
def test_bad_input_is_named_and_exits_with_2(arguments, text, folder, tmp_path, capsys):
    assert cli.main([a.replace("{model}", str(folder)).replace("{}", str(tmp_path)) for a in arguments]) == 2
    assert text in capsys.readouterr().err


def test_demo_fails_when_a_backend_differs(folder, tmp_path, monkeypatch, capsys):
    class Shifted(demo.OnnxRuntimeBackend):
        def __call__(self, tokens, state):
            logits, state = super().__call__(tokens, state)
            return logits[..., ::-1], state

    monkeypatch.setattr(demo, "OnnxRuntimeBackend", Shifted)
    monkeypatch.setattr(demo, "TorchBackend", lambda model, compiled=False: TorchBackend(model))
    monkeypatch.setattr(demo, "TEXT_BYTES", 2048)
    assert demo.run(folder, tmp_path / "m.onnx") == 1
    assert "ONNX Runtime writes other bytes than eager" in capsys.readouterr().out


def test_demo_compares_all_backends(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "TEXT_BYTES", 2048)
    torch._dynamo.reset()
    assert demo.run(folder, tmp_path / "m.onnx") == 0
    out = capsys.readouterr().out
    assert "All 4 backends wrote the same 128 bytes." in out and "torch.compile" in out


def test_the_committed_model_is_small_and_predicts_what_it_says():
    record = json.loads((TINY / "training.json").read_text())
    assert sum(os.path.getsize(file) for file in TINY.iterdir()) <= 2 * 2**20
    model = GDN2LM.from_pretrained(TINY)
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]
    # The standard library differs between Python versions, and with it the held-out text.
    measured = bits_per_byte(TorchBackend(model), corpus.held_out_text(64 * 1024))
    assert abs(measured - record["bits_per_byte"]) < 0.4
    assert record["minutes"] <= 20


def test_held_out_modules_are_never_learned_from():
    held_out = {file.name for file in corpus.held_out_files()}
    assert held_out and held_out.isdisjoint(file.name for file in corpus.training_files())
