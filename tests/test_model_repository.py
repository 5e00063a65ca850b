"""Repositories for every backend pass the check, each known trap does not, and what they promise a server is true."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from test_model import HYBRID, SMALL, small
from tritonclient.grpc import model_config_pb2

from gdn2_ops import cli
from gdn2_ops.backends import TorchBackend
from gdn2_ops.export import model_repository
from gdn2_ops.export.model_repository import Serving, write_repository
from gdn2_ops.export.repository_check import problems
from gdn2_ops.runtime.generate import generate
from gdn2_ops.runtime.session import TYPES, open_session, zeros

MODEL = small(SMALL.__class__(**(SMALL.__dict__ | {"vocab_size": 256})))
PROMPT = b"import "


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """One for each backend; a file that two of them hold is exported once."""
    made = {}

    def export_once(model, file, args=None, **options):
        key = type(model), options.get("state_names")
        if key in made:
            shutil.copy(made[key], file)
        made[key] = model_repository_export(model, file, args, **options) if key not in made else file
        return file

    model_repository_export = model_repository.export
    folders = {backend: tmp_path_factory.mktemp("models") / backend for backend in model_repository.BACKENDS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_repository, "export", export_once)
        for backend, folder in folders.items():
            assert write_repository(MODEL, folder, backend, Serving(slots=4, threads=1)) == folder
    return folders


@pytest.mark.parametrize("backend", model_repository.BACKENDS)
def test_a_repository_has_no_problems(backend, repositories, capsys):
    assert problems(repositories[backend]) == []
    assert cli.main(["check", str(repositories[backend])]) == 0
    assert "no problems" in capsys.readouterr().out


BAD = {  # what: (backend, model, pattern, replacement, part of the line that names it)
    "unknown field": ("python", "decode", r"max_batch_size", "max_batch", "cannot be read"),
    "another name": ("python", "decode", r'name: "gdn2_decode"', 'name: "decode"', "name of its folder"),
    "no backend": ("python", "decode", r'backend: "python"', "", "neither"),
    "another file": ("onnxruntime", "decode", r"model\.onnx", "other.onnx", "expected 1/other.onnx"),
    "aoti in batches": (
        "onnxruntime",
        "score",
        r'backend: "onnxruntime"\ndefault_model_filename: "model.onnx"',
        'backend: "pytorch" platform: "torch_aoti" default_model_filename: "model.onnx"',
        "torch_aoti has no batches",
    ),
    "aoti names": (
        "onnxruntime",
        "score",
        r'backend: "onnxruntime"\ndefault_model_filename: "model.onnx"([^$]*)max_batch_size: 4',
        r'backend: "pytorch" platform: "torch_aoti" default_model_filename: "model.onnx" \1',
        "INPUT__0",
    ),
    "python ignores states": (
        "onnxruntime",
        "decode",
        r'backend: "onnxruntime"',
        'backend: "python" parameters { key: "slots" value { string_value: "8" } }',
        "ignores it",
    ),
    "states swapped": (
        "onnxruntime",
        "decode",
        r"present_00_conv",
        "present_09_conv",
        "sort differently",
    ),
    "state as output": (
        "onnxruntime",
        "decode",
        r"(output \[)",
        r'\1 { name: "present_00_conv" data_type: TYPE_FP32 dims: [ 64, 3 ] },',
        "outputs too",
    ),
    "no initial state": ("tensorrt", "decode", r"(?s)initial_state \{.*?true \}", "", "has no initial_state"),
    "initial state from a file": ("tensorrt", "decode", r"zero_data: true", 'data_file: "x"', "zero_data"),
    "growable": ("tensorrt", "decode", r"(initial_state)", r"use_growable_memory: true \1", "states that grow"),
    "direct": ("onnxruntime", "decode", r"oldest \{.*\}", "direct { }", "expected the strategy oldest"),
    "idle for a second": ("python", "decode", r"max_sequence_idle_microseconds: \d+", "", "lost after one second"),
    "iterative": ("python", "decode", r"(sequence_batching \{)", r"\1 iterative_sequence: true", "iterative_sequence"),
    "delay": ("tensorrt", "decode", r"delay_microseconds: 0", "delay_microseconds: 500", "costs every token"),
    "too few slots": (
        "python",
        "decode",
        r'"slots" value \{ string_value: "8"',
        '"slots" value { string_value: "7"',
        "twice",
    ),
    "cache of sequences": ("python", "decode", r"\Z", "response_cache { enable: true }", "with sequences"),
    "warm-up of sequences": (
        "onnxruntime",
        "decode",
        r"\Z",
        'model_warmup [ { name: "x" } ]',
        "warm-up with sequences",
    ),
    "cache of a stream": ("python", "generate", r"\Z", "response_cache { enable: true }", "cache of a decoupled"),
    "batches of a stream": (
        "python",
        "generate",
        r"max_batch_size: 0",
        "max_batch_size: 4 dynamic_batching { }",
        "schedules its own batches",
    ),
    "library by name": ("onnxruntime", "decode", r'"/.*\.so"', '"libgdn2_onnxruntime.so"', "not absolute"),
    "library missing": ("onnxruntime", "decode", r"onnxruntime\.so", "no.so", "expected the library"),
    "graphs without sizes": (
        "tensorrt",
        "decode",
        r"preferred_batch_size: \[ 4 \]([^$]*)",
        r"\1 optimization { cuda { graphs: true } }",
        "CUDA graphs are captured",
    ),
    "graphs of other sizes": (
        "tensorrt",
        "score",
        r"\Z",
        "optimization { cuda { graphs: true graph_spec [ { batch_size: 4 graph_lower_bound { batch_size: 1 } } ] } }",
        "graph_lower_bound",
    ),
    "an input missing": ("onnxruntime", "step", r"past_00_conv", "past_00_other", "expected the inputs of model.onnx"),
    "another size": ("tensorrt", "decode", r"dims: \[ 4, 8, 8 \]", "dims: [ 4, 8, 9 ]", "of type and dims"),
    "another type": ("onnxruntime", "score", r"TYPE_INT64", "TYPE_FP32", "of type and dims"),
}


@pytest.mark.parametrize("what", BAD)
def test_each_trap_is_refused(what, repositories, tmp_path, capsys):
    backend, model, pattern, replacement, text = BAD[what]
    folder = tmp_path / "models" / f"gdn2_{model}"
    shutil.copytree(repositories[backend] / folder.name, folder)
    config = folder / "config.pbtxt"
    # The library's path is that of the repository: it moves along.
    moved = config.read_text().replace(str(repositories[backend].resolve()), str(folder.parent.resolve()))
    changed = re.sub(pattern, replacement, moved)
    assert changed != moved
    config.write_text(moved)
    assert problems(folder.parent) == []
    config.write_text(changed)
    found = problems(folder.parent)
    assert any(text in line and line.startswith(f"gdn2_{model}: ") for line in found), found
    assert cli.main(["check", str(folder.parent)]) == 1 and text in capsys.readouterr().out


def test_a_file_that_servers_cannot_read_is_refused(repositories, tmp_path):
    folder = shutil.copytree(repositories["tensorrt"], tmp_path / "models")
    file = folder / "gdn2_score" / "1" / "model.onnx"
    model = onnx.load(file)
    model.ir_version, model.opset_import[0].version = 13, 25
    onnx.save(model, file)
    assert problems(folder) == ["gdn2_score: expected IR <= 10 and opset <= 21, got 13 and 25"]
    shutil.rmtree(folder / "gdn2_step" / "1")
    assert "gdn2_step: expected a version folder like 1, got none" in problems(folder)


class ImplicitStates:
    """What a server does with a state block: pairs by sorted names, keeps each sequence's states, batches requests."""

    def __init__(self, folder: Path) -> None:
        self.config = text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
        self.session = open_session(folder / "1" / "model.onnx", threads=1)
        states = self.config.sequence_batching.state
        self.pairs = list(zip(sorted(x.input_name for x in states), sorted(x.output_name for x in states)))
        self.inputs = {x.name: x for x in self.session.get_inputs()}
        self.kept: dict[int, list[np.ndarray]] = {}

    def step(self, batch: dict[int, list[int]]) -> dict[int, np.ndarray]:
        """{sequence: tokens, as many for each} to {sequence: logits after the last}."""
        for key in batch:
            self.kept.setdefault(key, [zeros(self.inputs[name], 1) for name, _ in self.pairs])
        past = {name: np.concatenate([self.kept[k][i] for k in batch]) for i, (name, _) in enumerate(self.pairs)}
        wanted = ["logits", *(name for _, name in self.pairs)]
        tokens = np.array(list(batch.values()), TYPES[self.inputs["input_ids"].type])
        logits, *states = self.session.run(wanted, {"input_ids": tokens} | past)
        for row, key in enumerate(batch):
            self.kept[key] = [x[row : row + 1] for x in states]
        return {key: logits[row, -1] for row, key in enumerate(batch)}


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt"])
def test_states_kept_by_a_server_write_the_bytes_of_eager(backend, repositories):
    server, prompts = ImplicitStates(repositories[backend] / "gdn2_decode"), [PROMPT, b"return "]
    logits = server.step({key: list(prompt) for key, prompt in enumerate(prompts)})
    written: dict[int, list[int]] = {0: [], 1: []}
    for step in range(24):
        for key in written:
            if key in logits:
                written[key].append(int(logits[key].argmax()))
        alone = [0, 1] if step % 3 else [step % 2]  # now together, now one of them
        logits = server.step({key: written[key][-1:] for key in alone})
    eager = TorchBackend(MODEL)
    for key, prompt in enumerate(prompts):
        assert bytes(written[key]) == b"".join(generate(eager, prompt, len(written[key])))


def test_the_python_models_need_neither_torch_nor_this_package(repositories, tmp_path):
    version = repositories["python"] / "gdn2_generate" / "1"
    code = (
        "import sys; sys.modules['torch'] = None; sys.path.insert(0, sys.argv[1])\n"
        "from gdn2_ops.runtime.state_pool import StatePool\n"
        "from gdn2_ops.runtime.scheduler import Scheduler\n"
        "from gdn2_ops.runtime.generate import tokens_of\n"
        "scheduler = Scheduler(StatePool(sys.argv[1] + '/model.onnx', 2, threads=1))\n"
        f"generation = scheduler.submit(tokens_of({PROMPT!r}), 20)\n"
        "while not generation.done: scheduler.step()\n"
        "sys.stdout.buffer.write(bytes(generation.written))"
    )
    packages = [path for path in sys.path if path.endswith("site-packages")]
    environment = {"PYTHONPATH": os.pathsep.join(packages), "PATH": os.environ["PATH"]}
    run = [sys.executable, "-S", "-c", code, str(version)]
    written = subprocess.run(run, env=environment, cwd=tmp_path, capture_output=True, check=False, timeout=120)
    assert written.stdout == b"".join(generate(TorchBackend(MODEL), PROMPT, 20)), written.stderr.decode()


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"backend": "vllm"}, ValueError, "expected a backend in"),
        ({"serving": Serving(slots=0)}, ValueError, "expected slots above 0"),
        ({}, ValueError, "expected an empty folder"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_export(options, error, text, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(error, match=text):
        write_repository(MODEL, tmp_path, **options)


def test_attention_layers_are_served_by_the_python_backend_only(tmp_path):
    model = small(HYBRID)
    with pytest.raises(NotImplementedError, match="backend 'python' serves this model"):
        write_repository(model, tmp_path / "native", "onnxruntime")
    config = (write_repository(model, tmp_path / "python") / "gdn2_step" / "config.pbtxt").read_text()
    assert "past_01_length" in config and "reshape: { shape: [ ] }" in config
    assert problems(tmp_path / "python") == []
