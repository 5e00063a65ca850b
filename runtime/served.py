"""A served repository measured as `runtime.compare` measures what runs in this process."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from gdn2_ops.runtime.client import Client
from gdn2_ops.runtime.compare import LOGITS_AFTER, Measurement, Task, seconds
from gdn2_ops.runtime.generate import windows_of

SEQUENCE = 1
PROMPTS = 7  # read for the clock, at least


def measure_served(
    name: str, client: Client, task: Task, truth: NDArray[np.float32], *, prefix: str = "gdn2"
) -> Measurement:
    """The task over HTTP: text from `<prefix>_generate`, bits per byte from `_score`, logits from `_decode`.

    The server answers with the logits after the last token of a request: they are compared at the end of the prompt and
    after each byte that follows it. Prefill is one request of a window, decoding a stream of its own.

    Args:
        truth: `some_logits` of the first backend.

    Raises: ServerError, OSError: the server did not answer.
    """
    written, arrivals = [], []
    for part in client.generate(task.prompt, task.count):
        written.append(part)
        arrivals.append(time.perf_counter())
    streamed = len(b"".join(written[1:])) / max(arrivals[-1] - arrivals[0], 1e-9)

    parts = [list(task.prompt), *([byte] for byte in task.text[:LOGITS_AFTER])]
    logits = [_logits(client, prefix, part, start=i == 0, end=i + 1 == len(parts)) for i, part in enumerate(parts)]
    difference = np.abs(np.array(logits) - truth[len(task.prompt) - 1 :]).max()

    windows = windows_of(task.text, task.window).tolist()
    scores = [client.infer(f"{prefix}_score", {"tokens": ("INT32", [1, task.window], x)})["log_p"][1:] for x in windows]

    prefill = seconds(lambda: _logits(client, prefix, windows[0], start=True, end=True), PROMPTS)
    return Measurement(
        name,
        b"".join(written),
        float(-np.mean(scores) / np.log(2)),
        float(difference),
        task.window / prefill,
        streamed,
    )


def _logits(client: Client, prefix: str, tokens: list[int], *, start: bool, end: bool) -> list[float]:
    """Of the token after these."""
    sequence = {"sequence_id": SEQUENCE, "sequence_start": start, "sequence_end": end}
    return client.infer(f"{prefix}_decode", {"tokens": ("INT32", [1, len(tokens)], tokens)}, **sequence)["logits"]
