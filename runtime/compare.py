"""Backends side by side on one prompt and one text: what they write, how well they predict, how fast they are."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from statistics import median

import numpy as np
from numpy.typing import NDArray

from gdn2_ops.runtime.generate import Backend, bits_per_byte, generate, tokens_of, windows_of


@dataclass(frozen=True)
class Measurement:
    """One backend: the bytes it generates, bits per byte of the text, the largest difference of its logits from the
    first backend's, and tokens per second of prefill (one window) and of decoding, batch 1."""

    name: str
    generated: bytes
    bits_per_byte: float
    logits_difference: float
    prefill_per_s: float
    decode_per_s: float


@dataclass(frozen=True)
class Tolerance:
    """How far backends may differ and still be interchangeable. logits: largest difference. bits: of bits per byte.
    same_bytes: whether they generate the same. numbers: of any output, relative to the largest where that is above one.
    """

    logits: float = 1e-3
    bits: float = 1e-4
    same_bytes: bool = True
    numbers: float = 1e-4


@dataclass(frozen=True)
class Task:
    """What every backend is asked: continue the prompt by `count` bytes, and predict the text in windows. repeats: of a
    decoding step, for the clock."""

    prompt: bytes
    text: bytes
    count: int = 128
    window: int = 512
    repeats: int = 100


FLOAT32 = Tolerance()
LOGITS_AFTER = 16  # bytes after the prompt, one by one
LONG_ENOUGH = 0.3  # seconds of calls for the clock


def measure(name: str, backend: Backend, task: Task, truth: NDArray[np.float32] | None) -> Measurement:
    """Runs the task for its results, then for the clock (medians). truth: `some_logits` of the first backend."""
    generated = _written(backend, task)
    logits = some_logits(backend, task)
    difference = 0.0 if truth is None else float(np.abs(logits - truth).max())
    first = windows_of(task.text, task.window)[:1]
    _, state = backend(first, None)
    token = first[:, :1]
    return Measurement(
        name,
        generated,
        bits_per_byte(backend, task.text, window=task.window, batch=1),
        difference,
        task.window / seconds(lambda: backend(first, None), 1 + task.repeats // 20),
        1 / seconds(lambda: backend(token, state), task.repeats),
    )


def some_logits(backend: Backend, task: Task) -> NDArray[np.float32]:
    """The logits on the prompt, at once, and on the first bytes of the text after it, one by one."""
    tokens = tokens_of(task.prompt)[None]
    logits, state = backend(tokens, None)
    rows = [logits[0]]
    for byte in task.text[:LOGITS_AFTER]:
        logits, state = backend(np.array([[byte]], np.int64), state)
        rows.append(logits[0])
    return np.concatenate(rows)


def table(rows: list[Measurement]) -> str:
    """The measurements as text."""
    lines = [f"{'backend':<36}{'bits per byte':>15}{'max |logits diff|':>19}{'prefill tok/s':>15}{'decode tok/s':>14}"]
    for row in rows:
        lines.append(
            f"{row.name:<36}{row.bits_per_byte:>15.5f}{row.logits_difference:>19.1e}"
            f"{row.prefill_per_s:>15,.0f}{row.decode_per_s:>14,.0f}"
        )
    return "\n".join(lines)


def disagreements(rows: list[Measurement], tolerance: Tolerance = FLOAT32) -> list[str]:
    """What keeps the backends from being interchangeable; empty when they all agree with the first."""
    first, *others = rows
    found = []
    for row in others:
        if tolerance.same_bytes and row.generated != first.generated:
            pairs = zip_longest(row.generated, first.generated)
            at = next(i for i, (x, y) in enumerate(pairs) if x != y)
            found.append(f"{row.name} writes other bytes than {first.name}, from byte {at} on")
        if not row.logits_difference <= tolerance.logits:
            found.append(
                f"{row.name}: logits differ from {first.name} by {row.logits_difference:.1e} > {tolerance.logits:.0e}"
            )
        bits = abs(row.bits_per_byte - first.bits_per_byte)
        if not bits <= tolerance.bits:
            found.append(f"{row.name}: bits per byte differ from {first.name} by {bits:.1e} > {tolerance.bits:.0e}")
    return found


def _written(backend: Backend, task: Task) -> bytes:
    written: list[bytes] = []
    with suppress(FloatingPointError):  # then the logits differ, and that is said
        written.extend(generate(backend, task.prompt, task.count))
    return b"".join(written)


def seconds(call: Callable[[], object], repeats: int) -> float:
    """The median of so many calls, and of as many as fill a while: the first ones of a session are slower."""
    times: list[float] = []
    end = time.perf_counter() + LONG_ENOUGH * (repeats > 1)
    while len(times) < repeats or time.perf_counter() < end:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return median(times)
