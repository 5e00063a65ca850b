"""The main job on real input: one model eager, compiled, as one ONNX file and served, on text it has not seen."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gdn2_ops import corpus
from gdn2_ops.backends import TorchBackend
from gdn2_ops.export.model_repository import write_repository
from gdn2_ops.model import GDN2LM
from gdn2_ops.runtime.client import Client
from gdn2_ops.runtime.compare import Measurement, Task, disagreements, measure, some_logits, table
from gdn2_ops.runtime.served import measure_served
from gdn2_ops.runtime.server import Server
from gdn2_ops.runtime.session import OnnxRuntimeBackend

TEXT_BYTES = 32 * 1024  # scored
PROMPT_BYTES, PROMPT_AFTER = 384, 60_000  # the prompt ends where the first method after that byte begins
METHOD = b"\n    def "


def run(model_folder: Path, onnx_file: Path, server: Path | None = None) -> int:
    """Prints every step and the table.

    Args:
        onnx_file: where to leave the file that ONNX Runtime and the server run.
        server: an environment with Triton Inference Server, as `runtime.server.Server` takes it; None: without it.

    Returns: the exit status: 0, or 1 when a backend disagrees with eager.
    """
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
    with tempfile.TemporaryDirectory() as folder:
        with _step(f"export {onnx_file}"):
            repository = write_repository(model, Path(folder) / "models")
            shutil.copyfile(repository / "gdn2_decode" / "1" / "model.onnx", onnx_file)
        with _step("run the file in stock ONNX Runtime"):
            rows.append(measure("ONNX Runtime", OnnxRuntimeBackend(onnx_file), task, truth))
        with _step("run it in ONNX Runtime with our kernels"):
            rows.append(measure("ONNX Runtime + library", OnnxRuntimeBackend(onnx_file, library=True), task, truth))
        if server is not None:
            with _step("serve it with Triton Inference Server"):
                rows.append(_served(repository, server, task, truth))

    print("\n--- the prompt, a held-out module of the standard library ---\n" + _readable(task.prompt))
    print("--- continued by every backend ---\n" + _readable(rows[0].generated) + "\n")
    print(table(rows))
    wrong = disagreements(rows)
    print("\n".join(["", *wrong]) if wrong else f"\nAll {len(rows)} backends wrote the same {task.count} bytes.")
    return 1 if wrong else 0


def _served(repository: Path, environment: Path, task: Task, truth: NDArray[np.float32]) -> Measurement:
    with Server(repository, environment, log=repository.parent / "server.log") as running:
        return measure_served("Triton Inference Server", Client(running.http), task, truth)


@contextmanager
def _step(what: str) -> Iterator[None]:
    print(f"{what} ... ", end="", flush=True)
    began = time.perf_counter()
    yield
    print(f"{time.perf_counter() - began:.1f} s", flush=True)


def _readable(text: bytes) -> str:
    return text.decode("utf-8", "replace")
