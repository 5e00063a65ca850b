"""Ten minutes of traffic on the real server: memory stays, nothing fails, the last minute is as fast as the first.

Streams and sequences of different lengths from eight clients; one in ten leaves in the middle. Every answer is compared
with eager PyTorch's. Run by `make soak`; exit status 1 says which of the three did not hold.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from gdn2_ops.backends import TorchBackend
from gdn2_ops.export.model_repository import Serving, write_repository
from gdn2_ops.model import GDN2LM
from gdn2_ops.runtime.client import Client
from gdn2_ops.runtime.generate import generate
from gdn2_ops.runtime.server import DEFAULT_ENVIRONMENT, Server

ROOT = Path(__file__).parents[1]
TINY = ROOT / "examples" / "models" / "tiny"
CLIENTS, TEXTS, COUNT = 8, 16, 64
MEMORY, SPEED = 0.02, 0.10  # how far apart they may be


class Traffic(threading.Thread):
    """One client; tokens and errors are what it has seen so far."""

    def __init__(self, server: Server, texts: list[tuple[bytes, bytes]], seed: int, stop: threading.Event) -> None:
        super().__init__()
        self.server, self.texts, self.random, self.stop = server, texts, random.Random(seed), stop
        self.tokens, self.errors = 0, list[str]()

    def run(self) -> None:
        while not self.stop.is_set():
            prompt, wanted = self.random.choice(self.texts)
            count, leaves = self.random.randrange(1, COUNT), self.random.random() < 0.1
            way = self.random.choice([self._stream, self._sequence])
            try:
                written = b""
                for part in way(prompt, COUNT if leaves else count):
                    written += part
                    self.tokens += len(part)
                    if leaves and len(written) >= count:
                        break
                if written != wanted[: len(written)] or (not leaves and len(written) != count):
                    self.errors.append(f"wrote {written!r}, expected {wanted[:count]!r}")
            except Exception as error:  # whatever it is, it is an error of the soak
                self.errors.append(repr(error))

    def _stream(self, prompt: bytes, count: int) -> Iterator[bytes]:
        return Client(self.server.http).generate(prompt, count)

    def _sequence(self, prompt: bytes, count: int) -> Iterator[bytes]:
        client, sequence, tokens = Client(self.server.http), self.random.getrandbits(60) | 1, list(prompt)
        for i in range(count):
            tokens = [client.advance(sequence, tokens, start=i == 0, end=i + 1 == count)]
            yield bytes(tokens)


def resident_bytes(process: int) -> int:
    """Of a process and everything below it, what is shared between them counted once for each."""
    total = int(Path(f"/proc/{process}/statm").read_text().split()[1]) * 4096
    for task in Path(f"/proc/{process}/task").iterdir():
        for child in (task / "children").read_text().split():
            total += resident_bytes(int(child))
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)  # two on a busy machine wait for each other
    model = GDN2LM.from_pretrained(TINY)
    source, eager = (ROOT / "gdn2_ops" / "model.py").read_bytes(), TorchBackend(model)
    prompts = [source[97 * i : 97 * i + 1 + 13 * i] for i in range(TEXTS)]
    texts = [(prompt, b"".join(generate(eager, prompt, COUNT))) for prompt in prompts]
    with tempfile.TemporaryDirectory() as folder:
        repository = write_repository(
            model, Path(folder) / "models", serving=Serving(threads=1, slots=16, idle_seconds=5)
        )
        with Server(repository, DEFAULT_ENVIRONMENT, exit_seconds=10) as server:
            return _run(server, texts, options.minutes * 60)


def _run(server: Server, texts: list[tuple[bytes, bytes]], seconds: float) -> int:
    stop = threading.Event()
    clients = [Traffic(server, texts, seed, stop) for seed in range(CLIENTS)]
    for client in clients:
        client.start()
    tenth, rows, tokens = seconds / 10, [], 0
    try:
        for i in range(10):
            time.sleep(tenth)
            before, tokens = tokens, sum(client.tokens for client in clients)
            rows.append((resident_bytes(server.process.pid), (tokens - before) / tenth))
            errors = sum(len(client.errors) for client in clients)
            memory, speed = rows[-1]
            print(
                f"{(i + 1) * tenth:6.0f} s  {memory / 2**20:8.1f} MiB  {speed:8.0f} tokens/s  {errors} errors",
                flush=True,
            )
    finally:
        stop.set()
        for client in clients:
            client.join()
    failures = [error for client in clients for error in client.errors[:3]]
    memories, speeds = zip(*rows)
    if memories[-1] > memories[0] * (1 + MEMORY):
        failures.append(f"memory grew from {memories[0]:,} to {memories[-1]:,} bytes")
    if speeds[-1] < speeds[0] * (1 - SPEED):
        failures.append(f"speed fell from {speeds[0]:.0f} to {speeds[-1]:.0f} tokens/s")
    print("\n".join(failures) if failures else f"{tokens:,} tokens, no failure")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
