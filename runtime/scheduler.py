"""Many sequences through one pool of states: they join and leave between steps, and a step of all is one call.

`Scheduler` writes: a prompt comes in, its most probable continuation comes out, token by token. `Sequences` reads what
a caller sends under a key, call after call, and returns logits. `gdn2_ops.runtime.generate` and the server run these.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gdn2_ops.runtime.state_pool import Pool, Slot, SlotsExhausted


class Cancelled(RuntimeError):
    """A generation was cancelled by its caller."""


@dataclass
class Counters:
    """Since the beginning. read, written: tokens. steps, step_seconds: calls with one token for each sequence in them.
    evicted: sequences that lost their slot for not being used. not_finite: sequences that ended because numbers ran
    away."""

    read: int = 0
    written: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    evicted: int = 0
    not_finite: int = 0


@dataclass(eq=False)
class Generation:
    """A prompt being continued. written: the tokens so far; done: there will be no more; error: why it ended early."""

    prompt: NDArray[np.int64]
    count: int
    deadline: float | None
    written: list[int] = field(default_factory=list)
    done: bool = False
    error: Exception | None = None
    _slot: Slot | None = None
    _read: int = 0
    _cancelled: bool = False

    def cancel(self) -> None:
        """Ends it before the next step, from any thread."""
        self._cancelled = True


class Scheduler:
    """Continues prompts. Every step reads one chunk of prompts and adds one token to each sequence past its prompt.

    Args:
        pool: nobody else opens its slots.
        vocab: tokens are below it.
        waiting: how many generations may wait for a slot.
        clock: seconds.

    `submit` and `Generation.cancel` may be called from any thread, `step` from one.
    """

    def __init__(
        self, pool: Pool, *, vocab: int = 256, waiting: int = 1024, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._pool, self._vocab, self._limit, self._clock = pool, vocab, waiting, clock
        self._waiting: deque[Generation] = deque()
        self._joining = threading.Lock()  # of self._waiting
        self._live: list[Generation] = []
        self.counters = Counters()

    @property
    def live(self) -> int:
        return len(self._live)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def largest_state(self) -> float:
        """The largest norm of a recurrent state among the live sequences."""
        slots = [g._slot for g in list(self._live)]  # another thread may be reading
        return max((slot.norm for slot in slots if slot is not None), default=0.0)

    def submit(self, prompt: NDArray[np.int64], count: int, *, seconds: float | None = None) -> Generation:
        """A generation of `count` tokens that begins when a slot is free.

        Args: prompt: [T], T >= 1. seconds: from now, waiting included; then it ends with a TimeoutError.
        Raises: ValueError: no prompt, tokens out of range, count below 0. SlotsExhausted: too many are waiting.
        """
        _check_tokens(prompt, self._vocab)
        if count < 0:
            raise ValueError(f"expected a count of at least 0 tokens, got {count}")
        deadline = None if seconds is None else self._clock() + seconds
        generation = Generation(prompt, count, deadline, done=count == 0)
        with self._joining:
            if len(self._waiting) >= self._limit + self._pool.free:
                raise SlotsExhausted(f"expected at most {self._limit} generations waiting for a slot; try again later")
            if count:
                self._waiting.append(generation)
        return generation

    def step(self) -> list[Generation]:
        """Those that got a token or ended. With nothing waiting and nothing live it does nothing."""
        changed = self._end_early()
        with self._joining:
            while self._waiting and self._pool.free:
                self._live.append(self._waiting.popleft())
                self._live[-1]._slot = self._pool.open()
        writing = [g for g in self._live if g.written]
        reading, chunks = self._next_chunks()
        if writing:
            began = time.perf_counter()
            self._extend(writing, np.array([g.written[-1:] for g in writing], np.int64))
            self.counters.steps += 1
            self.counters.step_seconds += time.perf_counter() - began
        if reading:
            for generation in reading:
                generation._read += chunks.shape[1]
            self.counters.read += chunks.size
            self._extend(reading, chunks)
        self._live = [g for g in self._live if not g.done]
        return changed + writing + [g for g in reading if g.written or g.done]

    def fail(self, error: Exception) -> list[Generation]:
        """Ends everything that waits or lives with this error."""
        with self._joining:
            ended = [*self._waiting, *self._live]
            self._waiting.clear()
        for generation in ended:
            self._end(generation, error)
        self._live = []
        return ended

    def _end_early(self) -> list[Generation]:
        ended, now = [], self._clock()
        with self._joining:
            for generation in (*self._waiting, *self._live):
                so_far = f"after {len(generation.written)} of {generation.count} tokens"
                if generation._cancelled:
                    self._end(generation, Cancelled(f"cancelled {so_far}"))
                elif generation.deadline is not None and now >= generation.deadline:
                    self._end(generation, TimeoutError(f"deadline passed {so_far}"))
                else:
                    continue
                ended.append(generation)
            if ended:
                self._waiting = deque(g for g in self._waiting if not g.done)
                self._live = [g for g in self._live if not g.done]
        return ended

    def _next_chunks(self) -> tuple[list[Generation], NDArray[np.int64]]:
        """The next tokens of the prompt that waits longest, and of others with as many, up to a chunk in all."""
        reading = [g for g in self._live if g._read < len(g.prompt)]
        if not reading:
            return [], np.empty((0, 0), np.int64)
        lengths = [min(self._pool.chunk, len(g.prompt) - g._read) for g in reading]
        T = lengths[0]
        alike = [g for g, length in zip(reading, lengths) if length == T][: max(1, self._pool.chunk // T)]
        return alike, np.stack([g.prompt[g._read : g._read + T] for g in alike])

    def _extend(self, generations: list[Generation], tokens: NDArray[np.int64]) -> None:
        """Runs tokens [n, T]; those past their prompt write the most probable next one."""
        try:
            slots = [g._slot for g in generations if g._slot is not None]
            logits = self._pool.run(slots, tokens)
            lost = _run_away(self._pool, slots, logits)
        except Exception as error:  # of the runtime: these sequences are lost, the others are not
            for generation in generations:
                self._end(generation, error)
            return
        for i, token in enumerate(logits.argmax(1).tolist()):
            generation = generations[i]
            if i in lost:
                self.counters.not_finite += 1
                self._end(generation, lost[i])
            elif generation._read == len(generation.prompt):
                generation.written.append(token)
                self.counters.written += 1
                if len(generation.written) == generation.count:
                    self._end(generation, None)

    def _end(self, generation: Generation, error: Exception | None) -> None:
        if generation._slot is not None:
            self._pool.close(generation._slot)
            generation._slot = None
        generation.error = error
        generation.done = True  # last: another thread may be reading


class Part(NamedTuple):
    """The next tokens [T] of the sequence of that key. start: it begins with them; end: it ends with them."""

    key: Hashable
    tokens: NDArray[np.int64]
    start: bool = False
    end: bool = False


@dataclass
class _Kept:
    slot: Slot
    used: float  # when, by the clock


class Sequences:
    """Reads what callers send, part by part, and keeps the state between parts.

    Args:
        pool: nobody else opens its slots.
        idle_seconds: a sequence not used for so long loses its slot.
        vocab, clock: as in `Scheduler`.
    """

    def __init__(
        self, pool: Pool, *, idle_seconds: float, vocab: int = 256, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._pool, self._idle, self._vocab, self._clock = pool, idle_seconds, vocab, clock
        self._kept: dict[Hashable, _Kept] = {}  # the longest unused first
        self.counters = Counters()

    @property
    def live(self) -> int:
        return len(self._kept)

    @property
    def largest_state(self) -> float:
        """The largest norm of a recurrent state among the sequences that are kept."""
        return max((kept.slot.norm for kept in self._kept.values()), default=0.0)

    def advance(self, parts: Sequence[Part]) -> list[NDArray[np.float32] | Exception]:
        """Runs one part each of different sequences, those of one length in one call.

        Returns, for each part: logits [vocab] after its last token, or why there are none: ValueError: no tokens, or
            out of range; LookupError: no such sequence; SlotsExhausted; FloatingPointError: numbers ran away. A
            sequence that got a ValueError or SlotsExhausted is as it was before; after any other it has ended.
        """
        self.evict()
        results: list[NDArray[np.float32] | Exception] = [LookupError("not run")] * len(parts)
        slots: dict[int, Slot] = {}
        for i, part in enumerate(parts):
            try:
                slots[i] = self._slot(part)
            except (ValueError, LookupError, SlotsExhausted) as error:
                results[i] = error
        read = dict.fromkeys(slots, 0)
        while read:
            T, group = self._next_group({i: len(parts[i].tokens) - read[i] for i in read})
            tokens = np.stack([parts[i].tokens[read[i] : read[i] + T] for i in group])
            for i, result in zip(group, self._run([slots[i] for i in group], tokens)):
                read[i] += T
                if read[i] == len(parts[i].tokens) or isinstance(result, Exception):
                    results[i] = result
                    del read[i]
        for i in slots:
            if parts[i].end or isinstance(results[i], Exception):
                self._pool.close(self._kept.pop(parts[i].key).slot)
        return results

    def evict(self) -> None:
        """Takes the slots of sequences that were not used for `idle_seconds`; `advance` does it too."""
        now = self._clock()
        while self._kept:
            key, kept = next(iter(self._kept.items()))
            if now - kept.used < self._idle:
                return
            self._pool.close(self._kept.pop(key).slot)
            self.counters.evicted += 1

    def _slot(self, part: Part) -> Slot:
        _check_tokens(part.tokens, self._vocab)
        kept = self._kept.get(part.key)
        if kept is None and not part.start:
            raise LookupError(
                f"expected START with the first tokens of sequence {part.key}, got none: it never began, has ended, "
                f"or was evicted after {self._idle:g} s without use"
            )
        if kept is not None and part.start:
            self._pool.close(self._kept.pop(part.key).slot)
            kept = None
        slot = self._pool.open() if kept is None else self._kept.pop(part.key).slot
        self._kept[part.key] = _Kept(slot, self._clock())
        return slot

    def _next_group(self, left: dict[int, int]) -> tuple[int, list[int]]:
        """How many tokens next, and of which parts: a chunk of all that have as many; the single tokens last."""
        lengths = {i: min(self._pool.chunk, count) for i, count in left.items()}
        T = max(lengths.values())
        alike = [i for i, length in lengths.items() if length == T]
        return T, alike if T == 1 else alike[: max(1, self._pool.chunk // T)]

    def _run(self, slots: list[Slot], tokens: NDArray[np.int64]) -> list[NDArray[np.float32] | Exception]:
        began = time.perf_counter()
        try:
            logits = self._pool.run(slots, tokens)
            lost = _run_away(self._pool, slots, logits)
        except Exception as error:  # of the runtime: these sequences are lost, the others are not
            return [error] * len(slots)
        self.counters.read += tokens.size
        if tokens.shape[1] == 1:
            self.counters.steps += 1
            self.counters.step_seconds += time.perf_counter() - began
        self.counters.not_finite += len(lost)
        return [lost.get(i, row) for i, row in enumerate(logits)]


def _check_tokens(tokens: NDArray[np.int64], vocab: int) -> None:
    if tokens.ndim != 1 or not tokens.size:
        raise ValueError(f"expected at least one token in one row, got shape {tokens.shape}")
    if tokens.min() < 0 or tokens.max() >= vocab:
        raise ValueError(f"expected tokens in 0..{vocab - 1}, got {tokens.min()}..{tokens.max()}")


def _run_away(pool: Pool, slots: Sequence[Slot], logits: NDArray[np.float32]) -> dict[int, Exception]:
    """Which sequences of a call have a state or logits that are not finite; and notes how large the states are."""
    norms = pool.norms(slots).max(1, initial=0.0)
    lost: dict[int, Exception] = {}
    for i, slot in enumerate(slots):
        slot.norm = float(norms[i])
        if not np.isfinite(norms[i]):
            lost[i] = FloatingPointError(
                f"expected a finite state, got one of norm {slot.norm}; the sequence has ended; a model with "
                "guard_erase=True has states that do not grow by erasing"
            )
        elif not np.isfinite(logits[i]).all():
            lost[i] = FloatingPointError("expected finite logits, got NaN or infinity; the sequence has ended")
    return lost
