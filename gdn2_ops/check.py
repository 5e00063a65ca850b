"""`gdn2 check`: one ONNX file in every backend found here, on real text and on hard data. Do they agree, how fast?

What a backend is measured against is onnx's evaluator with the nodes in float64, and on text the PyTorch model where it
is at hand. Text is for language models of bytes; hard data (`runtime.hard_feeds`) for any file with our nodes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from gdn2_ops import corpus
from gdn2_ops.backends import TorchBackend
from gdn2_ops.export.onnx_bodies import float64_body, function_body, with_body
from gdn2_ops.export.onnx_schema import OPSET
from gdn2_ops.export.program import flatten_language_model
from gdn2_ops.model import GDN2LM
from gdn2_ops.runtime import tensorrt_rtx
from gdn2_ops.runtime.compare import FLOAT32, Task, Tolerance, disagreements, measure, some_logits, table
from gdn2_ops.runtime.generate import Backend
from gdn2_ops.runtime.hard_feeds import NODE, Feed, fixed_shapes, hard_feeds
from gdn2_ops.runtime.onnx_reference import OnnxReference
from gdn2_ops.runtime.onnxruntime_web import OnnxRuntimeWeb
from gdn2_ops.runtime.runner import LanguageModel, Port, Runner
from gdn2_ops.runtime.session import OnnxRuntime

TRUTH, REFERENCE, EAGER = "onnx, nodes in float64", "onnx reference", "torch eager"
BYTES = 256  # the vocabulary of models that text can be given to
PROMPT_BYTES, TEXT_BYTES = 384, 32 * 1024
SHORT_PROMPT, SHORT_COUNT, SHORT_WINDOW, SHORT_WINDOWS = 64, 16, 64, 4  # for backends in Python
# Measured on the model `tiny`, times four: each rounding of the weights' type moves its logits of up to 20.
TOLERANCES = {
    "float32": FLOAT32,
    "float16": Tolerance(logits=0.2, bits=1e-3, same_bytes=False, numbers=1e-2),
    "bfloat16": Tolerance(logits=0.7, bits=2e-3, same_bytes=False, numbers=8e-2),
    "int8": Tolerance(logits=5.0, bits=2e-2, same_bytes=False, numbers=0.3),
}


class TorchProgram:
    """A `Runner` of a language model in PyTorch, with the inputs and outputs of its exported file."""

    def __init__(self, model: GDN2LM, inputs: list[Port]) -> None:
        self._flat = flatten_language_model(model)
        if [x.name for x in inputs] != self._flat.input_names:
            raise ValueError(
                f"expected the model's inputs {self._flat.input_names}, got a file with {[x.name for x in inputs]}"
            )
        self.inputs, self.outputs = inputs, [Port(name, "float32", ()) for name in self._flat.output_names]

    @torch.no_grad()
    def run(self, feed: dict[str, NDArray]) -> list[NDArray]:
        tensors = [
            torch.from_numpy(np.array(feed[name], np.float32 if like.is_floating_point() else np.int64))
            for name, like in zip(self._flat.input_names, self._flat.args)
        ]
        return [x.numpy() for x in self._flat.module(*tensors)]


@dataclass(frozen=True)
class HardRow:
    """One backend on hard data. worst: the largest error, as `Tolerance.numbers` counts it, and on which input.
    seconds: for the last, longest one."""

    name: str
    worst: float
    at: str
    seconds: float


def run(file: Path, *, model_folder: Path | None = None, bodies: Sequence[str] = ()) -> int:
    """Prints what was compared and what was not. Returns the exit status: 0, or 1 when a backend disagrees.

    Args:
        file: with `gdn2::GatedDeltaNet2` nodes.
        model_folder: of the language model that was exported.
        bodies: of the nodes, to compare with the file's own, in stock ONNX Runtime.

    Raises: FileNotFoundError, ValueError: no such file, or it is none that can be checked. ImportError: no onnx.
    """
    model = _load(file)
    precision = _precision(model)
    opset = next((x.version for x in model.opset_import if x.domain in ("", "ai.onnx")), OPSET)
    truth = OnnxReference(with_body(model, float64_body(opset)))
    eager = None if model_folder is None else GDN2LM.from_pretrained(model_folder)
    print(f"{file}: {precision}, {sum(_is_ours(node) for node in model.graph.node)} gdn2::GatedDeltaNet2 nodes")
    opened, notes = _open(_runners(file, model, opset, bodies))
    if eager is not None:
        opened = {EAGER: TorchProgram(eager, truth.inputs)} | opened
    if not opened:
        raise ValueError(f"{file}: no backend here runs it:\n" + "\n".join(notes))
    wrong = []
    if _reads_bytes(truth):
        wrong += _check_text(truth, eager, opened, TOLERANCES[precision])
    wrong += _check_hard_data(model, truth, opened, TOLERANCES[precision])
    print("\n".join(["", *_built(model, truth.inputs), *notes]))
    print("\n" + ("\n".join(wrong) if wrong else f"All {len(opened)} backends agree: {', '.join(opened)}."))
    return 1 if wrong else 0


def _load(file: Path) -> onnx.ModelProto:
    if not file.is_file():
        raise FileNotFoundError(f"expected an ONNX file, got {str(file)!r}; gdn2 export MODEL --to onnx writes one")
    try:
        model = onnx.load(file)
        onnx.checker.check_model(os.fspath(file))
    except Exception as error:
        raise ValueError(f"{file}: expected an ONNX model, got {_first_line(error)}") from error
    if not any(_is_ours(node) for node in model.graph.node):
        raise ValueError(f"{file}: expected gdn2::GatedDeltaNet2 nodes, got none; gdn2_ops.export.onnx writes them")
    return model


def _is_ours(node: onnx.NodeProto) -> bool:
    return (node.domain, node.op_type) == NODE


def _precision(model: onnx.ModelProto) -> str:
    """Of the file: its least exact type."""
    if any(node.op_type in ("MatMulInteger", "DynamicQuantizeLinear") for node in model.graph.node):
        return "int8"
    types = {x.data_type for x in model.graph.initializer}
    types |= {x.type.tensor_type.elem_type for x in model.graph.input}
    for name in ("bfloat16", "float16"):
        if onnx.TensorProto.DataType.Value(name.upper()) in types:
            return name
    return "float32"


def _runners(file: Path, model: onnx.ModelProto, opset: int, bodies: Sequence[str]) -> dict[str, Callable[[], Runner]]:
    runners: dict[str, Callable[[], Runner]] = {
        REFERENCE: lambda: OnnxReference(model),
        "ONNX Runtime": lambda: OnnxRuntime(file),
        "ONNX Runtime + library": lambda: OnnxRuntime(file, library=True),
        "ONNX Runtime on CUDA": lambda: OnnxRuntime(file, cuda=True),
        "ONNX Runtime on CUDA + library": lambda: OnnxRuntime(file, cuda=True, library=True),
        "onnxruntime-web": lambda: OnnxRuntimeWeb(file),
    }
    for kind in bodies:
        changed = with_body(onnx.load(file, load_external_data=False), function_body(kind, opset))
        runners[f"ONNX Runtime, body {kind}"] = partial(
            OnnxRuntime, changed.SerializeToString(), weights_folder=file.parent
        )
    return runners


def _open(runners: dict[str, Callable[[], Runner]]) -> tuple[dict[str, Runner], list[str]]:
    """Those that are found here and load the file, and why the others do not."""
    opened, notes = {}, []
    for name, open_it in runners.items():
        try:
            opened[name] = open_it()
        except ImportError as error:
            notes.append(f"not found: {name}: {error}")
        except Exception as error:  # each runtime has errors of its own
            notes.append(f"not run: {name}: {_first_line(error)}")
    return opened, notes


def _reads_bytes(runner: Runner) -> bool:
    return (
        runner.inputs[0].name == "input_ids"
        and runner.outputs[0].name == "logits"
        and (runner.outputs[0].shape[-1] == BYTES)
    )


def _check_text(truth: Runner, eager: GDN2LM | None, opened: dict[str, Runner], tolerance: Tolerance) -> list[str]:
    """Against PyTorch; without it all are given as little text as what is slow."""
    text = corpus.held_out_text(PROMPT_BYTES + TEXT_BYTES)
    long = Task(text[:PROMPT_BYTES], text[PROMPT_BYTES:])
    rest = text[PROMPT_BYTES:][: SHORT_WINDOW * SHORT_WINDOWS]
    short = Task(text[:PROMPT_BYTES][-SHORT_PROMPT:], rest, SHORT_COUNT, SHORT_WINDOW, repeats=5)
    first: Backend = LanguageModel(truth) if eager is None else TorchBackend(eager)
    first_name = TRUTH if eager is None else EAGER
    backends = {name: LanguageModel(x) for name, x in opened.items() if name != EAGER}
    slow = {name: x for name, x in backends.items() if name == REFERENCE or eager is None}
    fast = {name: x for name, x in backends.items() if name not in slow}
    wrong = []
    for task, group in ((long, fast), (short, slow)):
        if group:
            logits = some_logits(first, task)
            rows = [measure(first_name, first, task, None)]
            for name, x in group.items():
                try:
                    rows.append(measure(name, x, task, logits))
                except Exception as failure:  # each runtime has errors of its own
                    wrong.append(f"{name}: {_first_line(failure)}")
            print(f"\ntext: {len(task.text):,} bytes of held-out modules, {task.count} bytes generated")
            print(table(rows))
            wrong += disagreements(rows, tolerance)
    return wrong


def _check_hard_data(
    model: onnx.ModelProto, truth: Runner, opened: dict[str, Runner], tolerance: Tolerance
) -> list[str]:
    feeds = list(hard_feeds(model, truth.inputs))
    exact = [truth.run(feed.inputs) for feed in feeds]
    rows = [hard_row(name, runner, feeds, exact) for name, runner in opened.items()]
    print(f"\nhard data: {len(feeds)} inputs, compared with {TRUTH}")
    print(f"{'backend':<36}{'largest error':>15}{'ms, ' + str(feeds[-1].tokens) + ' tokens':>17}  worst on")
    for row in rows:
        print(f"{row.name:<36}{row.worst:>15.1e}{row.seconds * 1e3:>17.2f}  {row.at}")
    return [
        f"{row.name}: differs from {TRUTH} by {row.worst:.1e} > {tolerance.numbers:.0e} on {row.at}"
        for row in rows
        if not row.worst <= tolerance.numbers
    ]


def hard_row(name: str, runner: Runner, feeds: Sequence[Feed], exact: Iterable[list[NDArray]]) -> HardRow:
    """A backend on hard data. exact: the outputs wanted for each feed."""
    worst, at = -1.0, ""
    for feed, want in zip(feeds, exact, strict=True):
        began = time.perf_counter()
        try:
            got = runner.run(feed.inputs)
        except Exception as failure:  # each runtime has errors of its own
            return HardRow(name, np.inf, f"{feed.name}: {_first_line(failure)}", np.nan)
        seconds = time.perf_counter() - began
        error = max(_error(y, z) for y, z in zip(got, want, strict=True))
        if not error <= worst:
            worst, at = error, feed.name
    return HardRow(name, worst, at, seconds)


def _error(got: NDArray, want: NDArray) -> float:
    got, want = got.astype(np.float64), want.astype(np.float64)
    if got.shape != want.shape or not np.isfinite(got).all():
        return np.inf
    return float(np.abs(got - want).max(initial=0) / max(1.0, np.abs(want).max(initial=0)))


def _built(model: onnx.ModelProto, inputs: Sequence[Port]) -> list[str]:
    """What TensorRT-RTX makes of the file; it needs a GPU to run, so there are no numbers to compare."""
    smallest, usual, largest = (fixed_shapes(inputs, *sizes) for sizes in ((1, 1), (1, 64), (4, 512)))
    try:
        engine = tensorrt_rtx.build(
            model.SerializeToString(), {x.name: (smallest[x.name], usual[x.name], largest[x.name]) for x in inputs}
        )
    except ImportError as error:
        return [f"not found: TensorRT-RTX: {error}"]
    except Exception as error:
        return [f"not built: TensorRT-RTX: {_first_line(error)}"]
    return [
        f"built, not run: TensorRT-RTX {engine.version}, for compute capability 8.9: {engine.layers} layers, "
        f"{engine.size:,} bytes, {engine.seconds:.1f} s"
    ]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
