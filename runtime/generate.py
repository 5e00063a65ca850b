"""Text from any backend: prefill once, then one token at a time; and the bits per byte a backend needs for a text.

A backend is anything called as `logits, state = backend(tokens, state)`: tokens [B, T] int64 and the state before them
(None at the beginning) to logits [B, T, vocab] float32 and the state after them, in numpy. The state is the backend's
own; a backend with `state_norms(state)` -> [B, states] float32 says how large it is, and of one without, such as a
TensorRT plan whose state stays on the GPU, the logits alone are looked at. Tokens are bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gdn2_ops.runtime.scheduler import Scheduler
from gdn2_ops.runtime.state_pool import SeparateStates


class Backend(Protocol):
    """See the module's docstring."""

    def __call__(self, tokens: NDArray[np.int64], state: Any | None) -> tuple[NDArray[np.float32], Any]: ...


def generate(backend: Backend, prompt: bytes, count: int) -> Iterator[bytes]:
    """Yields the `count` most probable next bytes, one by one, each fed back. Deterministic.

    Raises: ValueError: the prompt is empty. FloatingPointError: logits or a state are not finite.
    """
    if not prompt:
        raise ValueError("expected a prompt of at least one byte, got none")
    scheduler = Scheduler(SeparateStates(backend))
    generation = scheduler.submit(tokens_of(prompt), count)
    for i in range(count):
        while len(generation.written) == i and not generation.done:
            scheduler.step()
        if generation.error is not None:
            raise generation.error
        yield bytes(generation.written[i:])


def bits_per_byte(backend: Backend, text: bytes, *, window: int = 512, batch: int = 8) -> float:
    """Mean of -log2 p over the bytes of whole windows of the text, each window read from an empty state.

    The first byte of a window is given, not scored. A rest shorter than a window is left out.

    Raises: ValueError: the text is shorter than one window.
    """
    windows = windows_of(text, window)
    total = 0.0
    for begin in range(0, len(windows), batch):
        tokens = windows[begin : begin + batch]
        logits, _ = backend(tokens, None)
        log_p = log_softmax(logits[:, :-1])
        total -= float(np.take_along_axis(log_p, tokens[:, 1:, None], -1).sum())
    return total / (len(windows) * (window - 1) * np.log(2))


def windows_of(text: bytes, window: int) -> NDArray[np.int64]:
    """The whole windows of a text, [windows, window]. Raises: ValueError: there is none."""
    count = len(text) // window
    if count == 0:
        raise ValueError(f"expected a text of at least one window of {window} bytes, got {len(text)}")
    return tokens_of(text[: count * window]).reshape(count, window)


def tokens_of(text: bytes) -> NDArray[np.int64]:
    """The bytes of a text as tokens, [T]."""
    return np.frombuffer(text, np.uint8).astype(np.int64)


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
