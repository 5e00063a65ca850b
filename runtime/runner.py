"""Whatever runs an exported file: numpy in, numpy out; and a language model on top of it."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from gdn2_ops.runtime.norms import norms, watched


class Port(NamedTuple):
    """An input or output of a graph. dtype: numpy's name, or the runtime's where numpy has none. shape: sizes, and
    names or None for dynamic axes."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


class Runner(Protocol):
    """A loaded file. run: inputs by name to outputs in their order."""

    inputs: list[Port]
    outputs: list[Port]

    def run(self, feed: dict[str, NDArray]) -> list[NDArray]: ...


class LanguageModel:
    """tokens [B, T] and a state to logits [B, T, vocab] and a state, one graph for both prefill and decoding.

    Args:
        runner: of a file that `check_language_model` accepts.
    """

    def __init__(self, runner: Runner) -> None:
        check_language_model([x.name for x in runner.inputs], [x.name for x in runner.outputs])
        self._runner, self._past = runner, runner.inputs[1:]
        self._watched = watched([x.name for x in self._past], [x.dtype for x in self._past])

    def __call__(self, tokens: NDArray[np.int64], state: Any | None) -> tuple[NDArray[np.float32], Any]:
        if state is None:
            state = [self._empty(x, tokens.shape[0]) for x in self._past]
        logits, *state = self._runner.run({"input_ids": tokens} | {x.name: y for x, y in zip(self._past, state)})
        return logits.astype(np.float32, copy=False), state

    def state_norms(self, state: Any) -> NDArray[np.float32]:
        return norms([state[i] for i in self._watched])

    @staticmethod
    def _empty(x: Port, batch: int) -> NDArray:
        return np.zeros([size if isinstance(size, int) else batch for size in x.shape], x.dtype)


def check_language_model(inputs: list[str], outputs: list[str]) -> None:
    """Raises ValueError unless input_ids and the states go in, and logits and as many states come out."""
    if inputs[:1] != ["input_ids"] or outputs[:1] != ["logits"] or len(inputs) != len(outputs):
        raise ValueError(f"expected input_ids and states to logits and as many states, got {inputs} to {outputs}")
