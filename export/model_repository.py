"""A model repository for Triton Inference Server from one language model.

write_repository(model, folder)                    backend "python": everything below runs, in the server of the wheel
                                                   nvidia-pytriton too
write_repository(..., backend="onnxruntime")       for servers that carry that backend
write_repository(..., backend="tensorrt")          ... from plans that `build_plans.sh`, written beside, makes

    gdn2_generate   (python) a prompt in, its continuation out as a stream
    gdn2_decode     the state stays on the server between the requests of a sequence
    gdn2_score      log-probabilities of a text: no state, batched, cached
    gdn2_step       the state travels with each request

With the python backend a repository is complete: beside the model lie the modules of `gdn2_ops.runtime` and the library
that it needs; the server's Python needs numpy and onnxruntime.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import onnx
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gdn2_ops.compiled import find_library
from gdn2_ops.export.onnx import export
from gdn2_ops.export.tensorrt_commands import TRTEXEC_FLAGS

BACKENDS = ("python", "onnxruntime", "tensorrt")
STATE_NAMES = "{when}_{layer:02d}_{field}"  # the server pairs states by their sorted names
LIBRARY = "libgdn2_onnxruntime.so"
TYPES = {onnx.TensorProto.FLOAT: "FP32", onnx.TensorProto.FLOAT16: "FP16", onnx.TensorProto.INT64: "INT64"}
WARM_UP_TOKENS = 64


@dataclass(frozen=True)
class Serving:
    """How a model is served.

    name: prefix of the models. slots: sequences decoded at a time, of each model that keeps states. idle_seconds: a
    sequence without a request for so long ends. waiting: prompts that may wait for a slot. most: tokens of a prompt, of
    a continuation and of a scored text. chunk: tokens of a prompt read in one call. threads: of ONNX Runtime, 0 leaves
    it to that. library: path of our ONNX Runtime library on the machine of the server, for the onnxruntime backend;
    None is the copy in the repository, "" runs function bodies.
    """

    name: str = "gdn2"
    slots: int = 64
    idle_seconds: float = 60.0
    waiting: int = 1024
    most: int = 16384
    chunk: int = 256
    threads: int = 0
    library: str | None = None


def write_repository(
    model: nn.Module,
    folder: str | Path,
    backend: str = "python",
    serving: Serving | None = None,
    *,
    body: str = "chunk",
) -> Path:
    """Writes the repository of a language model (`export.program` says what that is) whose tokens are bytes.

    Args:
        model: in evaluation mode.
        folder: made if it is not there; must be empty.
        backend: "python", "onnxruntime" or "tensorrt".
        body: of the ONNX file, as in `export.onnx.export`; TensorRT without our plugin runs it.

    Returns: the folder.
    Raises: ValueError: no such backend, a folder that is not empty, or numbers below 1. NotImplementedError: attention
        layers for another backend than "python".
    """
    folder, serving = Path(folder), serving or Serving()
    if backend not in BACKENDS:
        raise ValueError(f"expected a backend in {list(BACKENDS)}, got {backend!r}")
    for field in ("slots", "idle_seconds", "waiting", "most", "chunk"):
        if getattr(serving, field) <= 0:
            raise ValueError(f"expected {field} above 0, got {getattr(serving, field)}")
    if backend != "python" and any(x.dim() == 1 for x in pytree.tree_leaves(cast(Any, model).initial_state(1))):
        raise NotImplementedError(
            f"backend {backend!r}: expected states with dimensions, got one number for each sequence, as attention "
            "layers have; the server keeps no such state: backend 'python' serves this model"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"expected an empty folder, got {str(folder)!r} with files in it")
    writer = _Python(folder, serving) if backend == "python" else _Native(folder, serving, backend)
    writer.write(model, body)
    return folder


def server_flags(folder: str | Path, backend: str) -> str:
    """The command that serves a repository."""
    path = Path(folder).resolve()
    if backend == "python":
        return f"gdn2 serve {folder}"
    flags = f"tritonserver --model-repository={path} --cache-config=local,size=16777216 --disable-auto-complete-config"
    if backend == "onnxruntime":
        return flags
    return (
        f"PLUGIN=/path/to/plugin.so sh {path}/build_plans.sh && "
        f"{flags} --backend-config=tensorrt,plugins=/path/to/plugin.so"
    )


@dataclass(frozen=True)
class _Tensor:
    name: str
    type: str  # as in TYPE_<type>
    dims: tuple[int, ...]  # without the batch; -1 is any

    def text(self, more: str = "") -> str:
        dims = f"dims: [ {', '.join(map(str, self.dims))} ]" if self.dims else "dims: [ 1 ] reshape: { shape: [ ] }"
        return f'{{ name: "{self.name}" data_type: TYPE_{self.type} {dims}{more} }}'


class _Writer:
    def __init__(self, folder: Path, serving: Serving) -> None:
        self.folder, self.serving = folder, serving

    def version_folder(self, model: str) -> Path:
        path = self.folder / f"{self.serving.name}_{model}" / "1"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def write_config(self, model: str, lines: Iterable[str]) -> None:
        name = f"{self.serving.name}_{model}"
        (self.folder / name / "config.pbtxt").write_text("\n".join([f'name: "{name}"', *lines]) + "\n")

    def write_language_model(self, model: nn.Module, body: str, others: Iterable[str]) -> tuple[list[_Tensor], ...]:
        """The file for the model "decode", and linked for the others: (inputs, outputs), the states after the first."""
        file = export(model, self.version_folder("decode") / "model.onnx", body=body, state_names=STATE_NAMES)
        for other in others:
            for path in file.parent.iterdir():
                _link(path, self.version_folder(other) / path.name)
        graph = onnx.load(file, load_external_data=False).graph
        return [_tensor(x) for x in graph.input], [_tensor(x) for x in graph.output]

    def sequence_batching(self, extra: str = "") -> str:
        """Batches of the oldest requests first; a batch leaves as it is, for waiting only costs time."""
        return (
            "sequence_batching {\n"
            f"  max_sequence_idle_microseconds: {int(self.serving.idle_seconds * 1e6)}\n"
            f"  oldest {{ max_candidate_sequences: {self.serving.slots} preferred_batch_size: [ {self.serving.slots} ] "
            "max_queue_delay_microseconds: 0 }\n"
            f"{extra}}}"
        )


class _Python(_Writer):
    def write(self, model: nn.Module, body: str) -> None:
        inputs, outputs = self.write_language_model(model, body, ("generate", "score", "step"))
        vocab, slots = outputs[0].dims[-1], self.serving.slots
        for name in ("generate", "decode", "score", "step"):
            self._write_code(name)
        tokens = _Tensor("tokens", "INT32", (-1,))
        optional = " optional: true"
        self.write_config(
            "generate",
            [
                'backend: "python"',
                "max_batch_size: 0",
                "model_transaction_policy { decoupled: true }",
                _list(
                    "input",
                    [
                        _Tensor("text", "STRING", (1,)).text(optional),
                        tokens.text(optional),
                        _Tensor("count", "INT32", (1,)).text(),
                        _Tensor("seconds", "FP32", (1,)).text(optional),
                    ],
                ),
                _list("output", [tokens.text(), _Tensor("text", "STRING", (1,)).text()]),
                *self._process(
                    slots=slots, chunk=self.serving.chunk, waiting=self.serving.waiting, most=self.serving.most
                ),
            ],
        )
        # The server frees a sequence a little before this clock agrees: twice the slots are never short.
        self.write_config(
            "decode",
            [
                'backend: "python"',
                f"max_batch_size: {slots}",
                _list("input", [tokens.text(" allow_ragged_batch: true")]),
                _list("output", [_Tensor("next", "INT32", (1,)).text(), _Tensor("logits", "FP32", (vocab,)).text()]),
                self.sequence_batching(),
                *self._process(slots=2 * slots, chunk=self.serving.chunk),
            ],
        )
        self.write_config(
            "score",
            [
                'backend: "python"',
                f"max_batch_size: {slots}",
                _list("input", [tokens.text(" allow_ragged_batch: true")]),
                _list("output", [_Tensor("log_p", "FP32", (-1,)).text()]),
                "dynamic_batching { max_queue_delay_microseconds: 500 }",
                "response_cache { enable: true }",
                _warm_up("tokens", "INT32"),
                *self._process(most=self.serving.most),
            ],
        )
        self.write_config(
            "step",
            [
                'backend: "python"',
                f"max_batch_size: {slots}",
                _list("input", [x.text() for x in inputs]),
                _list("output", [x.text() for x in outputs]),
                "dynamic_batching { max_queue_delay_microseconds: 0 }",
                *self._process(),
            ],
        )

    def _process(self, **parameters: int) -> list[str]:
        values = {"threads": self.serving.threads, "library": "yes", **parameters}
        return [
            "instance_group [ { kind: KIND_CPU count: 1 } ]",
            *(f'parameters {{ key: "{key}" value {{ string_value: "{x}" }} }}' for key, x in values.items()),
        ]

    def _write_code(self, name: str) -> None:
        """The runtime without the rest of the package, whose import would need PyTorch."""
        folder = self.version_folder(name)
        (folder / "model.py").write_text(
            "import sys\nfrom pathlib import Path\n\nsys.path.insert(0, str(Path(__file__).parent))\n"
            f"from gdn2_ops.runtime.triton_models import {name.capitalize()} as TritonPythonModel  # noqa: E402, F401\n"
        )
        package = folder / "gdn2_ops"
        for inner in ("runtime", "lib"):
            (package / inner).mkdir(parents=True)
        (package / "__init__.py").write_text(f'"""What a server needs of gdn2_ops {version("gdn2-ops")}."""\n')
        installed = next(
            path for path in map(Path, sys.modules["gdn2_ops"].__path__) if (path / "compiled.py").is_file()
        )
        shutil.copy(installed / "compiled.py", package)
        for file in (installed / "runtime").glob("*.py"):
            shutil.copy(file, package / "runtime")
        shutil.copy(find_library(LIBRARY), package / "lib" / LIBRARY)


class _Native(_Writer):
    """Models that a backend of the server runs without Python."""

    def __init__(self, folder: Path, serving: Serving, backend: str) -> None:
        super().__init__(folder, serving)
        self.tensorrt = backend == "tensorrt"
        self.file = "model.plan" if self.tensorrt else "model.onnx"

    def write(self, model: nn.Module, body: str) -> None:
        inputs, outputs = self.write_language_model(model, body, ("step",))
        slots = self.serving.slots
        self._write_score(model, body)
        states = ",\n".join(_state(x, y) for x, y in zip(inputs[1:], outputs[1:]))
        self.write_config(
            "decode",
            [
                *self._backend("decode"),
                f"max_batch_size: {slots}",
                _list("input", [inputs[0].text()]),
                _list("output", [outputs[0].text()]),
                self.sequence_batching(f"  state [\n{states}\n  ]\n"),
            ],
        )
        self.write_config(
            "step",
            [
                *self._backend("step"),
                f"max_batch_size: {slots}",
                _list("input", [x.text() for x in inputs]),
                _list("output", [x.text() for x in outputs]),
                "dynamic_batching { max_queue_delay_microseconds: 0 }",
            ],
        )
        self.write_config(
            "score",
            [
                *self._backend("score"),
                f"max_batch_size: {slots}",
                _list("input", [_Tensor("tokens", "INT64", (-1,)).text()]),
                _list("output", [_Tensor("log_p", "FP32", (-1,)).text()]),
                "dynamic_batching { max_queue_delay_microseconds: 500 }",
                "response_cache { enable: true }",
                _warm_up("tokens", "INT64"),
            ],
        )
        if self.tensorrt:
            self._write_plan_script(inputs[1:])

    def _write_score(self, model: nn.Module, body: str) -> None:
        export(
            _LogProbabilities(model),
            self.version_folder("score") / "model.onnx",
            (torch.zeros(2, 3, dtype=torch.int64),),
            body=body,
            dynamic={"tokens": {0: "batch", 1: "sequence"}},
            output_names=["log_p"],
        )

    def _backend(self, model: str) -> list[str]:
        kind = "instance_group [ { kind: KIND_GPU count: 1 } ]"
        if self.tensorrt:
            return ['platform: "tensorrt_plan"', f'default_model_filename: "{self.file}"', kind]
        lines = ['backend: "onnxruntime"', f'default_model_filename: "{self.file}"', kind.replace("GPU", "CPU")]
        library = self.serving.library
        if library is None:
            copy = self.version_folder(model) / LIBRARY
            shutil.copy(find_library(LIBRARY), copy)
            library = os.fspath(copy.resolve())
        if library:
            lines.append(f'model_operations {{ op_library_filename: [ "{library}" ] }}')
        return [
            *lines,
            f'parameters {{ key: "intra_op_thread_count" value {{ string_value: "{self.serving.threads}" }} }}',
        ]

    def _write_plan_script(self, states: list[_Tensor]) -> None:
        """A plan belongs to one TensorRT and one GPU: it is built where it runs."""

        def shapes(model: str, batch: int, T: int) -> str:
            if model == "score":
                return f"tokens:{batch}x{T}"
            rows = [f"{x.name}:{'x'.join(map(str, (batch, *x.dims)))}" for x in states]
            return ",".join([f"input_ids:{batch}x{T}", *rows])

        slots = self.serving.slots
        lines = ["#!/bin/sh", "# PLUGIN=/path/to/plugin.so sh build_plans.sh", "set -e", 'cd "$(dirname "$0")"']
        for model in ("decode", "step", "score"):
            folder = f"{self.serving.name}_{model}/1"
            most = self.serving.most if model == "score" else self.serving.chunk
            lines.append(
                f"trtexec --onnx={folder}/model.onnx --saveEngine={folder}/model.plan {' '.join(TRTEXEC_FLAGS)}"
                f" ${{PLUGIN:+--dynamicPlugins=$PLUGIN}} --minShapes={shapes(model, 1, 1)}"
                f" --optShapes={shapes(model, slots, 1)} --maxShapes={shapes(model, slots, most)}"
            )
        (self.folder / "build_plans.sh").write_text("\n".join(lines) + "\n")


class _LogProbabilities(nn.Module):
    """tokens [B, T] int64 -> log_p [B, T] float32, the natural log of each one's probability; 0 for the first."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)

    def forward(self, tokens: Tensor) -> Tensor:
        logits, _ = self.model(tokens)
        following = tokens.roll(-1, 1)[..., None]
        log_p = logits.float().log_softmax(-1).gather(-1, following).squeeze(-1).roll(1, 1)
        return log_p.masked_fill(torch.arange(tokens.shape[1], device=tokens.device) == 0, 0.0)


def _list(field: str, items: list[str]) -> str:
    return f"{field} [\n  " + ",\n  ".join(items) + "\n]"


def _state(before: _Tensor, after: _Tensor) -> str:
    dims = ", ".join(map(str, before.dims))
    shape = f"data_type: TYPE_{before.type} dims: [ {dims} ]"
    return (
        f'    {{ input_name: "{before.name}" output_name: "{after.name}" {shape}\n'
        f'      initial_state {{ name: "zeros" {shape} zero_data: true }} }}'
    )


def _warm_up(name: str, type: str) -> str:
    shape = f"data_type: TYPE_{type} dims: [ {WARM_UP_TOKENS} ] zero_data: true"
    return f'model_warmup [ {{ name: "one" batch_size: 1 count: 1 inputs {{ key: "{name}" value {{ {shape} }} }} }} ]'


def _tensor(x: Any) -> _Tensor:
    batch, *dims = x.type.tensor_type.shape.dim
    assert batch.dim_param, x.name
    return _Tensor(x.name, TYPES[x.type.tensor_type.elem_type], tuple(d.dim_value or -1 for d in dims))


def _link(source: Path, target: Path) -> None:
    """One copy on the disk where the file system has links; each name is a whole file to everybody else."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)
