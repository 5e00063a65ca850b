"""Rung 10: in the real Torch-TensorRT our converters are chosen, and make the plugin of a call of our operators.

The plugin is made by a real registry; the network is a stand-in, for TensorRT's needs a GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KEYS, VALUES, STATE = [-1, -1, 2, 64], [-1, -1, 4, 32], [-1, 4, 64, 32]
INPUTS = [[name, KEYS if name in "qkgb" else VALUES] for name in "qkvgbw"]
FIELD = ["float32", "PluginFieldType.FLOAT32"]


@pytest.fixture(scope="module")
def seen(built, empty_libraries):
    def folder(name: str) -> Path:
        path = HERE.parent.parent / "build" / "tensorrt" / name
        if not path.is_dir():
            pytest.skip(f"the wheel {name} is not in {path.parent}: make test-tensorrt fetches it")
        return path

    lean = folder("lean-11.4.0.106")
    env = os.environ | {"PYTHONPATH": f"{folder('torch-tensorrt-2.13.0')}:{folder('bindings-11.4.0.106')}"}
    env["LD_LIBRARY_PATH"] = f"{empty_libraries}:{lean / 'tensorrt_lean_libs'}"
    command = [sys.executable, HERE / "torch_tensorrt_converters.py", built.library]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_call_is_one_plugin_layer(seen):
    first, *_ = seen["calls"]
    assert first == ["plugin", [*INPUTS, ["state", STATE]], []]
    assert seen["outputs"][0] == [["o", VALUES], ["final_state", STATE]]
    assert seen["fields"] == [["scale", scale, *FIELD] for scale in (0.5, 0.25, 2.0, 1.0)]


def test_a_call_without_a_state_begins_with_zeros(seen):
    assert seen["calls"][1:3] == [
        ["full", ["q[0]", 4, 64, 32], 0.0, "torch.float32"],
        ["plugin", [*INPUTS, ["node_zeros", STATE]], []],
    ]
    full, plugin = seen["calls"][4:]
    assert full == ["full", [3, 4, 64, 32], 0.0, "torch.float32"]  # a batch of a fixed size, arguments by name
    assert plugin[1][6] == ["fixed_zeros", [3, 4, 64, 32]]


def test_a_step_is_a_sequence_of_one_token(seen):
    token = [[f"{name}+", [-1, 1, *shape[2:]]] for name, shape in INPUTS]
    assert seen["calls"][3] == ["plugin", [*token, ["state", STATE]], []]
    assert seen["outputs"][2] == [["o-", [-1, 4, 32]], ["final_state", STATE]]


def test_packed_sequences_stay_in_pytorch(seen):
    assert seen["packed"]


def test_without_torch_tensorrt_the_error_names_the_wheel():
    from gdn2_ops.export import torch_tensorrt

    with pytest.raises(ImportError, match="needs torch_tensorrt: pip install torch-tensorrt"):
        torch_tensorrt.register()
