"""The main job on real input: one model eager, compiled and as one ONNX file, compared on text it has not seen."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gdn2_ops import corpus
from gdn2_ops.backends import TorchBackend
from gdn2_ops.export.onnx import export
from gdn2_ops.model import GDN2LM
from gdn2_ops.runtime.compare import Task, disagreements, measure, some_logits, table
from gdn2_ops.runtime.session import OnnxRuntimeBackend

TEXT_BYTES = 32 * 1024  # scored
PROMPT_BYTES, PROMPT_AFTER = 384, 60_000  # the prompt ends where the first method after that byte begins
METHOD = b"\n    def "


def run(model_folder: Path, onnx_file: Path) -> int:
    """Prints every step and the table. Returns the exit status: 0, or 1 when a backend disagrees with eager."""
    with _step(f"load {model_folder}"):
        model = GDN2LM.from_pretrained(model_folder)
    text = corpus.held_out_text(2 * PROMPT_AFTER)
    before, method, _ = text[PROMPT_AFTER:].partition(METHOD)
    end = PROMPT_AFTER + len(before) + len(method)
    task = Task(prompt=text[:end][-PROMPT_BYTES:], text=text[:TEXT_BYTES])

    eager = TorchBackend(model)
    truth = some_logits(eager, task)
    with _step("run eager PyTorch"):
        rows = [measure("eager", eager, task, None)]
    with _step("torch.compile(fullgraph=True) and run"):
        rows.append(measure("torch.compile", TorchBackend(model, compiled=True), task, truth))
    with _step(f"export {onnx_file}"):
        export(model, onnx_file)
    with _step("run the file in stock ONNX Runtime"):
        rows.append(measure("ONNX Runtime", OnnxRuntimeBackend(onnx_file), task, truth))
    with _step("run it in ONNX Runtime with our kernels"):
        rows.append(measure("ONNX Runtime + library", OnnxRuntimeBackend(onnx_file, library=True), task, truth))

    print("\n--- the prompt, a held-out module of the standard library ---\n" + _readable(task.prompt))
    print("--- continued by every backend ---\n" + _readable(rows[0].generated) + "\n")
    print(table(rows))
    wrong = disagreements(rows)
    print("\n".join(["", *wrong]) if wrong else f"\nAll {len(rows)} backends wrote the same {task.count} bytes.")
    return 1 if wrong else 0


@contextmanager
def _step(what: str) -> Iterator[None]:
    print(f"{what} ... ", end="", flush=True)
    began = time.perf_counter()
    yield
    print(f"{time.perf_counter() - began:.1f} s", flush=True)


def _readable(text: bytes) -> str:
    return text.decode("utf-8", "replace")
