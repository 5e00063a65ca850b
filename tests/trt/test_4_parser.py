"""Rung 4: TensorRT's ONNX parser finds the plugin for the node of an exported model; without it the body is built.

The parser and the builder are those of TensorRT-RTX, which work without a GPU. It has no layers for plugins.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

HERE = Path(__file__).parent
SEARCHED = "Searching for plugin: GatedDeltaNet2, plugin_version: 1, plugin_namespace: gdn2"


@pytest.fixture
def parse(wheel):
    def parsed(*arguments) -> subprocess.CompletedProcess:
        env = os.environ | {"PYTHONPATH": str(wheel("rtx-1.7.1.116"))}
        command = [sys.executable, HERE / "parser.py", *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)

    return parsed


def test_the_parser_finds_the_plugin(parse, exported, built):
    done = parse(exported, built.library)
    assert done.returncode == -signal.SIGABRT
    assert SEARCHED in done.stdout and "INFO Successfully created plugin: GatedDeltaNet2" in done.stdout
    assert "ERROR" not in done.stdout


def test_a_refusal_of_the_creator_is_in_the_parser_s_log(parse, exported, built, tmp_path):
    model = onnx.load(exported)
    node = next(node for node in model.graph.node if node.op_type == "GatedDeltaNet2")
    node.attribute.remove(next(attribute for attribute in node.attribute if attribute.name == "scale"))
    onnx.save(model, tmp_path / "without.onnx")
    done = parse(tmp_path / "without.onnx", built.library)
    assert done.returncode == 0 and "parsed False" in done.stdout
    assert "ERROR gdn2::GatedDeltaNet2: expected the field scale, a float, got a node without it" in done.stdout


def test_without_the_plugin_the_body_is_built(parse, exported):
    done = parse(exported)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("built ") and "for TensorRT-RTX 1.7.1.116" in done.stdout
