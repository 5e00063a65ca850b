"""The served model of the tests on the real server, and the ways to talk to it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tritonclient import grpc

from gdn2_ops.backends import TorchBackend
from gdn2_ops.export import model_repository
from gdn2_ops.export.model_repository import Serving, write_repository
from gdn2_ops.model import GDN2LM
from gdn2_ops.runtime.client import Client, generate_by_grpc
from gdn2_ops.runtime.generate import generate
from gdn2_ops.runtime.server import Server

ROOT = Path(__file__).parents[1]
TINY = ROOT / "examples" / "models" / "tiny"
ENVIRONMENT = ROOT / ".venv-serve"
SMALL = Serving(name="small", slots=2, idle_seconds=1.5, waiting=1, threads=1)  # every limit within reach
EAGER = TorchBackend(GDN2LM.from_pretrained(TINY))
SECRETS = [f"password_{i:03d} = '{i * 7919 % 100000:05d}{'xyz'[i % 3] * (i % 17)}'\n" for i in range(64)]


def eager(prompt: bytes, count: int) -> bytes:
    return b"".join(generate(EAGER, prompt, count))


@pytest.fixture(scope="session")
def repository(tmp_path_factory) -> Path:
    """Models gdn2_* with room for 64 sequences, small_* with room for two; one export."""
    folder = tmp_path_factory.mktemp("served")
    write_repository(GDN2LM.from_pretrained(TINY), folder / "gdn2", serving=Serving(threads=1))
    file = folder / "gdn2" / "gdn2_decode" / "1" / "model.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_repository, "export", lambda model, target, **_: shutil.copy(file, target))
        write_repository(GDN2LM.from_pretrained(TINY), folder / "small", serving=SMALL)
    for model in ("small_decode", "small_generate"):
        shutil.move(folder / "small" / model, folder / "gdn2" / model)
    return folder / "gdn2"


@pytest.fixture(scope="session")
def server(repository, tmp_path_factory) -> Iterator[Server]:
    with Server(repository, ENVIRONMENT, log=tmp_path_factory.mktemp("log") / "server.log", exit_seconds=5) as running:
        yield running


def only(repository: Path, folder: Path, *models: str) -> Path:
    """A repository of some of the models, for a server that a test may break."""
    for model in models:
        shutil.copytree(repository / model, folder / model)
    return folder


def tensors(values: dict[str, np.ndarray]) -> list[grpc.InferInput]:
    kinds = {"int32": "INT32", "int64": "INT64", "float32": "FP32"}
    inputs = []
    for name, x in values.items():
        inputs.append(grpc.InferInput(name, x.shape, kinds[x.dtype.name]))
        inputs[-1].set_data_from_numpy(x)
    return inputs


def by_http_sequence(server: Server, prompt: bytes, count: int, sequence: int) -> bytes:
    client, written = Client(server.http), [int(x) for x in prompt]
    for i in range(count):
        tokens = written if i == 0 else written[-1:]
        written.append(client.advance(sequence, tokens, start=i == 0, end=i + 1 == count))
    return bytes(written[len(prompt) :])


def by_grpc_sequence(server: Server, prompt: bytes, count: int, sequence: int) -> bytes:
    written = [int(x) for x in prompt]
    with grpc.InferenceServerClient(server.grpc) as client:
        for i in range(count):
            tokens = np.array([written if i == 0 else written[-1:]], np.int32)
            answer = client.infer(
                "gdn2_decode",
                tensors({"tokens": tokens}),
                sequence_id=sequence,
                sequence_start=i == 0,
                sequence_end=i + 1 == count,
                outputs=[grpc.InferRequestedOutput("next")],
            )
            written.append(int(answer.as_numpy("next").item()))
    return bytes(written[len(prompt) :])


def by_event_stream(server: Server, prompt: bytes, count: int, sequence: int) -> bytes:
    return b"".join(Client(server.http).generate(prompt, count))


def by_grpc_stream(server: Server, prompt: bytes, count: int, sequence: int) -> bytes:
    return b"".join(generate_by_grpc(server.grpc, prompt, count))


WAYS: dict[str, Callable[[Server, bytes, int, int], bytes]] = {
    "HTTP, one request for each token": by_http_sequence,
    "gRPC, one request for each token": by_grpc_sequence,
    "HTTP, server-sent events": by_event_stream,
    "gRPC stream": by_grpc_stream,
}


def at_once(calls: list[Callable[[], object]]) -> list:
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(timeout=120) for future in [pool.submit(call) for call in calls]]


def metric(server: Server, name: str, model: str) -> float:
    text = urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=10).read().decode()
    for line in text.splitlines():
        found = re.match(rf'{name}\{{(?=[^}}]*model="{model}")[^}}]*\}} (\S+)', line)
        if found:
            return float(found[1])
    raise AssertionError(f"no metric {name} of {model}")


def becomes(call: Callable[[], float], want: float, seconds: float = 15) -> bool:
    """Whether it is so within that time: metrics are brought up to date twice a second."""
    began = time.monotonic()
    while call() != want:
        if time.monotonic() - began > seconds:
            return False
        time.sleep(0.1)
    return True


def another_process(code: str, *arguments: str) -> subprocess.Popen:
    """A client that a test can kill; returns once it has written a line."""
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None and process.stdout.readline()
    return process
