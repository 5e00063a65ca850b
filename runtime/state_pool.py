"""States of many sequences, kept so that a step of all of them is one call and copies nothing.

A pool is what a scheduler needs of a model:

    slot = pool.open()                      # a sequence before its first token
    logits = pool.run(slots, tokens)        # tokens [n, T] int64 -> logits [n, vocab] after the last of them
    pool.close(slot)                        # its slot may be opened again
    norms = pool.norms(slots)               # [n, states] float32, of their recurrent states
    pool.free, pool.chunk                   # slots left; how many tokens of a prompt to read in one call

`StatePool` is an ONNX file with all states in one buffer for each name; `SeparateStates` any backend of
`gdn2_ops.runtime.generate`, one call for each sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gdn2_ops.runtime.norms import norms, watched
from gdn2_ops.runtime.session import TYPES, open_language_model, zeros


class Slot:
    """A sequence in a pool: the row of its states, which changes when others leave; None once it is closed.
    norm: the largest of its recurrent states when a scheduler last looked."""

    __slots__ = ("norm", "row", "state")

    def __init__(self, row: int) -> None:
        self.row: int | None = row
        self.state: Any = None
        self.norm = 0.0


class SlotsExhausted(RuntimeError):
    """Every slot of a pool is taken."""


class Pool(Protocol):
    """See the module's docstring."""

    chunk: int

    @property
    def free(self) -> int: ...
    def open(self) -> Slot: ...
    def close(self, slot: Slot) -> None: ...
    def run(self, slots: Sequence[Slot], tokens: NDArray[np.int64]) -> NDArray[np.float32]: ...
    def norms(self, slots: Sequence[Slot]) -> NDArray[np.float32]: ...


class StatePool:
    """The states of up to `slots` sequences of an exported language model in ONNX Runtime.

    The rows in use are always the first ones: a sequence that leaves is replaced by the last row. A call binds the rows
    of its sequences as both past and present, so states are read and written where they are.

    Args:
        file, threads, library: as in `open_language_model`.
        slots: at least 1. Memory is touched only when a slot is first used.
        chunk: tokens of a prompt read in one call; more would only make others wait, and logits take memory.

    Raises: ValueError: the file's inputs and outputs are others, or it cannot run with past and present in one buffer.
    """

    def __init__(
        self, file: str | Path, slots: int, *, threads: int = 0, library: bool = True, chunk: int = 256
    ) -> None:
        if slots < 1 or chunk < 1:
            raise ValueError(f"expected at least one slot and a chunk of at least one token, got {slots} and {chunk}")
        self.chunk = chunk
        self._session = open_language_model(file, threads=threads, library=library)
        self._past, self._present = self._session.get_inputs()[1:], self._session.get_outputs()[1:]
        self.vocab: int = self._session.get_outputs()[0].shape[-1]
        self._states = [zeros(x, slots) for x in self._past]
        self._watched = watched([x.name for x in self._past], [x.dtype.name for x in self._states])
        self._slots: list[Slot] = []  # by row
        self._tokens = np.zeros((slots, 1), np.int64)
        self._logits = np.zeros((slots, 1, self.vocab), np.float32)
        self._binding: tuple[tuple[int, int], Any] | None = None  # of a decoding step, for (first row, rows)
        self._refuse_if_not_in_place(str(file))

    @property
    def free(self) -> int:
        return len(self._tokens) - len(self._slots)

    def open(self) -> Slot:
        """A slot with a state of zeros. Raises: SlotsExhausted."""
        row = len(self._slots)
        if row == len(self._tokens):
            raise SlotsExhausted(
                f"expected a free slot, got all {row} in use; end a sequence or export with more slots"
            )
        for state in self._states:
            state[row] = 0
        self._slots.append(Slot(row))
        return self._slots[row]

    def close(self, slot: Slot) -> None:
        """Frees the slot. Raises: ValueError: it is closed already."""
        row, last = _row(slot), self._slots.pop()
        slot.row = None
        if last is not slot:
            for state in self._states:
                state[row] = state[len(self._slots)]
            self._slots[row] = last
            last.row = row

    def run(self, slots: Sequence[Slot], tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Reads tokens [n, T] int64, one row for each of n distinct slots.

        Returns: logits [n, vocab] float32 after the last token, in memory of its own.
        Raises: ValueError: a slot is closed or given twice, or the shape of tokens is another.
        """
        if tokens.ndim != 2 or len(tokens) != len(slots) or not tokens.size:
            raise ValueError(f"expected tokens of shape ({len(slots)}, T) with T >= 1, got {tokens.shape}")
        first = self._gather(slots)
        rows = np.array([slot.row for slot in slots]) - first
        if tokens.shape[1] == 1:
            self._tokens[first + rows] = tokens
            self._session.run_with_iobinding(self._decoding(first, len(slots)))
            return self._logits[first + rows, 0]
        in_order = np.empty_like(tokens, order="C")
        in_order[rows] = tokens
        logits = np.empty((*tokens.shape, self.vocab), np.float32)
        self._session.run_with_iobinding(self._bind(first, in_order, logits))
        return logits[rows, -1]

    def norms(self, slots: Sequence[Slot]) -> NDArray[np.float32]:
        """Of the recurrent states of distinct slots, [n, states] float32. Raises: ValueError: as `run`."""
        first = self._gather(slots)
        rows = slice(first, first + len(slots))
        in_order = norms([self._states[i][rows] for i in self._watched])
        return in_order[[_row(slot) - first for slot in slots]]

    def _gather(self, slots: Sequence[Slot]) -> int:
        """Moves the slots to adjacent rows, the fewest it can, and returns the first of them."""
        rows = np.sort([_row(slot) for slot in slots])
        if (np.diff(rows) == 0).any():
            raise ValueError("expected distinct slots in one call, got one twice")
        n = len(rows)
        if rows[-1] - rows[0] == n - 1:
            return int(rows[0])
        inside = np.searchsorted(rows, rows + n) - np.arange(n)  # of the slots, in a window that begins at each of them
        first = min(int(rows[inside.argmax()]), len(self._slots) - n)
        wanted = set(map(id, slots))
        strangers = (row for row in range(first, first + n) if id(self._slots[row]) not in wanted)
        for row in rows[(rows < first) | (rows >= first + n)]:
            self._swap(int(row), next(strangers))
        return first

    def _swap(self, i: int, j: int) -> None:
        for state in self._states:
            kept = state[i].copy()
            state[i] = state[j]
            state[j] = kept
        self._slots[i], self._slots[j] = self._slots[j], self._slots[i]
        self._slots[i].row, self._slots[j].row = i, j

    def _decoding(self, first: int, n: int) -> Any:
        if self._binding is None or self._binding[0] != (first, n):
            rows = slice(first, first + n)
            self._binding = (first, n), self._bind(first, self._tokens[rows], self._logits[rows])
        return self._binding[1]

    def _bind(self, first: int, tokens: NDArray[np.int64], logits: NDArray[np.float32]) -> Any:
        binding = self._session.io_binding()
        binding.bind_input("input_ids", "cpu", 0, np.int64, tokens.shape, tokens.ctypes.data)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        for past, present, state in zip(self._past, self._present, self._states):
            rows = state[first : first + len(tokens)]
            binding.bind_input(past.name, "cpu", 0, state.dtype, rows.shape, rows.ctypes.data)
            binding.bind_output(present.name, "cpu", 0, state.dtype, rows.shape, rows.ctypes.data)
        return binding

    def _refuse_if_not_in_place(self, file: str) -> None:
        """A graph may write a present before it has read the past; then numbers would be wrong, so it is tried."""
        other = {x.name for x in (*self._past, *self._present) if x.type not in TYPES}
        if other or [x.shape for x in self._past] != [x.shape for x in self._present]:
            raise ValueError(f"{file}: expected states of one shape and type before and after, got others: {other}")
        random = np.random.default_rng(0)
        for tokens in (np.array([[1]]), np.array([[1, 2, 3]])):
            slot = self.open()
            for state in self._states:
                state[0] = random.standard_normal(state.shape[1:]) / 8 if state.dtype != np.int64 else 0
            feed = {"input_ids": tokens} | {x.name: s[:1].copy() for x, s in zip(self._past, self._states)}
            want_logits, *want = self._session.run(None, feed)
            got_logits = self.run([slot], tokens)
            same = [np.array_equal(got_logits[0], want_logits[0, -1])]
            same += [np.array_equal(state[:1], y) for state, y in zip(self._states, want)]
            self.close(slot)
            if not all(same):
                raise ValueError(f"{file}: expected the same numbers with past and present in one buffer, got others")


class SeparateStates:
    """A pool of any backend of `gdn2_ops.runtime.generate`: one call for each sequence, a prompt at once."""

    chunk = 2**31

    def __init__(self, backend: Any, slots: int = 1) -> None:
        self._backend, self.free = backend, slots

    def open(self) -> Slot:
        """Raises: SlotsExhausted."""
        if not self.free:
            raise SlotsExhausted("expected a free slot, got all in use")
        self.free -= 1
        return Slot(0)

    def close(self, slot: Slot) -> None:
        _row(slot)
        slot.row, slot.state = None, None
        self.free += 1

    def run(self, slots: Sequence[Slot], tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        rows = []
        for slot, row in zip(slots, tokens, strict=True):
            _row(slot)
            logits, slot.state = self._backend(row[None], slot.state)
            rows.append(logits[0, -1])
        return np.stack(rows)

    def norms(self, slots: Sequence[Slot]) -> NDArray[np.float32]:
        """As the backend's `state_norms` says; of a backend that has none, [n, 0]."""
        state_norms = getattr(self._backend, "state_norms", None)
        if state_norms is None:
            return np.zeros((len(slots), 0), np.float32)
        return np.concatenate([state_norms(slot.state) for slot in slots])


def _row(slot: Slot) -> int:
    if slot.row is None:
        raise ValueError("expected an open slot, got one that is closed")
    return slot.row
