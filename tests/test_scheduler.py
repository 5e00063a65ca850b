"""Sequences that join, leave, stall and fail between steps get what they get alone; slots come back clean."""

import numpy as np
import onnx
import pytest
import torch
from test_model import HYBRID, small

from gdn2_ops import state_norms
from gdn2_ops.backends import TorchBackend
from gdn2_ops.export.onnx import export
from gdn2_ops.runtime.scheduler import Cancelled, Part, Scheduler, Sequences
from gdn2_ops.runtime.session import OnnxRuntimeBackend
from gdn2_ops.runtime.state_pool import SeparateStates, SlotsExhausted, StatePool

VOCAB = HYBRID.vocab_size


class Repeater:
    """A backend that writes its prompt again and again: whatever it writes says whose sequence it is."""

    def __call__(self, tokens, state):
        (row,) = tokens.tolist()
        prompt, seen = (row, 0) if state is None else state
        if 63 in row:
            raise RuntimeError("the runtime failed")
        logits = np.zeros((1, len(row), VOCAB), np.float32)
        logits[0, -1, prompt[seen % len(prompt)]] = np.nan if 62 in row else 1
        return logits, (prompt, seen + 1)


class CountingPool(SeparateStates):
    """Notes how many sequences and tokens each call had."""

    def __init__(self, slots, chunk=2**31):
        super().__init__(Repeater(), slots)
        self.slots, self.chunk, self.calls = slots, chunk, []

    def run(self, slots, tokens):
        self.calls.append(tokens.shape)
        return super().run(slots, tokens)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return export(small(HYBRID), tmp_path_factory.mktemp("model") / "model.onnx")


def row(*tokens):
    return np.array(tokens, np.int64)


def repeated(prompt, count):
    return [prompt[i % len(prompt)] for i in range(count)]


def finish(scheduler, steps=1000):
    while scheduler.live or scheduler.waiting:
        scheduler.step()
        steps -= 1
        assert steps > 0


def test_generations_of_any_length_join_and_leave_and_write_what_they_write_alone():
    pool = CountingPool(slots=4)
    scheduler, random = Scheduler(pool, vocab=VOCAB), np.random.default_rng(0)
    wanted = []
    for _ in range(30):
        for _ in range(random.integers(3)):
            prompt = random.integers(60, size=random.integers(1, 9))
            wanted.append((scheduler.submit(prompt, int(random.integers(12))), prompt.tolist()))
        assert len(scheduler.step()) <= 4 and scheduler.live <= 4
    finish(scheduler)
    assert len(wanted) > 20 and all(g.written == repeated(prompt, g.count) for g, prompt in wanted)
    assert all(g.done and g.error is None for g, _ in wanted) and pool.free == 4
    assert max(n for n, T in pool.calls if T == 1) == 4
    assert scheduler.counters.written == sum(g.count for g, _ in wanted)


def test_a_step_is_one_call_and_one_chunk_of_a_prompt():
    pool = CountingPool(slots=8, chunk=4)
    scheduler = Scheduler(pool, vocab=VOCAB)
    writing = [scheduler.submit(row(1, 2), 20) for _ in range(3)]
    scheduler.step()
    assert pool.calls == [(2, 2)]  # two prompts of two tokens are a chunk
    scheduler.step()
    long = scheduler.submit(np.arange(9), 3)
    pool.calls.clear()
    for _ in range(3):
        assert not long.written
        scheduler.step()
    assert pool.calls == [(3, 1), (1, 4), (3, 1), (1, 4), (3, 1), (1, 1)]
    assert long.written and all(len(g.written) >= 4 for g in writing)


def test_cancel_deadline_and_a_full_queue():
    clock, pool = Clock(), CountingPool(slots=1)
    scheduler = Scheduler(pool, vocab=VOCAB, waiting=2, clock=clock)
    first = scheduler.submit(row(7), 50)
    scheduler.step()
    late, other = scheduler.submit(row(8), 5, seconds=2.0), scheduler.submit(row(9), 2)
    with pytest.raises(SlotsExhausted, match="at most 2 generations waiting"):
        scheduler.submit(row(1), 1)
    clock.now += 2
    assert late in scheduler.step() and isinstance(late.error, TimeoutError) and not late.written
    first.cancel()
    assert first in scheduler.step() and isinstance(first.error, Cancelled) and len(first.written) == 2
    finish(scheduler)
    assert other.written == [9, 9] and other.error is None and pool.free == 1
    three = [scheduler.submit(row(i), 1) for i in range(3)]  # a free slot is no place to wait
    with pytest.raises(SlotsExhausted):
        scheduler.submit(row(1), 1)
    finish(scheduler)
    assert [g.written for g in three] == [[0], [1], [2]]
    rest = [scheduler.submit(row(1), 3), scheduler.submit(row(2), 3)]
    scheduler.step()
    assert scheduler.fail(RuntimeError("stopping")) and all("stopping" in str(g.error) for g in rest)
    assert scheduler.live == scheduler.waiting == 0 and pool.free == 1


@pytest.mark.parametrize("bad, error", [(62, "finite logits"), (63, "the runtime failed")])
def test_what_fails_ends_alone(bad, error):
    pool = CountingPool(slots=4)
    scheduler = Scheduler(pool, vocab=VOCAB)
    good, failing = scheduler.submit(row(3, 4), 6), scheduler.submit(row(5, 5, bad), 6)
    finish(scheduler)
    assert error in str(failing.error) and not failing.written
    assert good.written == repeated([3, 4], 6) and pool.free == 4


class Growing(Repeater):
    """The states of a prompt that begins with 50 grow by a factor of 1e4 a token, and overflow before the logits do."""

    def state_norms(self, state):
        prompt, seen = state
        with np.errstate(over="ignore"):
            return np.full((1, 2), np.float32(10.0) ** (4 * seen) if prompt[0] == 50 else 2, np.float32)


def test_a_state_that_runs_away_ends_its_sequence_only():
    pool = SeparateStates(Growing(), 3)
    scheduler = Scheduler(pool, vocab=VOCAB)
    good, growing = scheduler.submit(row(3, 4), 20), scheduler.submit(row(50, 5), 20)
    for _ in range(4):
        scheduler.step()
    assert scheduler.largest_state > 1e6
    finish(scheduler)
    assert isinstance(growing.error, FloatingPointError) and "finite state, got one of norm inf" in str(growing.error)
    assert 5 < len(growing.written) < 12 and growing.written == repeated([50, 5], len(growing.written))
    assert good.error is None and good.written == repeated([3, 4], 20)
    assert pool.free == 3 and scheduler.counters.not_finite == 1 and scheduler.largest_state == 0
    pool = SeparateStates(Growing(), 3)
    sequences = Sequences(pool, idle_seconds=60, vocab=VOCAB)
    answers = [sequences.advance([Part(key, row(50 - key), start=i == 0) for key in (0, 1)]) for i in range(8)]
    assert sequences.largest_state > 1e30
    while not isinstance(answers[-1][0], Exception):
        answers.append(sequences.advance([Part(key, row(50 - key)) for key in (0, 1)]))
    assert isinstance(answers[-1][0], FloatingPointError) and not isinstance(answers[-1][1], Exception)
    assert sequences.live == 1 and sequences.counters.not_finite == 1 and sequences.largest_state == 2


@pytest.mark.parametrize(
    "prompt, count, text",
    [((), 1, "at least one token"), ((1, VOCAB), 1, "0..63, got 1..64"), ((1,), -1, "at least 0")],
)
def test_a_bad_prompt_is_refused_before_it_takes_a_slot(prompt, count, text):
    scheduler = Scheduler(CountingPool(1), vocab=VOCAB)
    with pytest.raises(ValueError, match=text):
        scheduler.submit(row(*prompt), count)
    assert scheduler.waiting == 0


def test_sequences_say_what_is_missing_and_keep_what_is_right():
    clock, pool = Clock(), CountingPool(slots=2)
    sequences = Sequences(pool, idle_seconds=10, vocab=VOCAB, clock=clock)

    def advance(*parts):
        return [x if isinstance(x, Exception) else int(x.argmax()) for x in sequences.advance(list(parts))]

    assert advance(Part("a", row(1, 2), start=True), Part("b", row(3), start=True)) == [1, 3]
    lost, full = advance(Part("c", row(4)), Part("d", row(4), start=True))
    assert "expected START" in str(lost) and isinstance(lost, LookupError) and isinstance(full, SlotsExhausted)
    (bad,) = advance(Part("a", row(VOCAB)))
    assert isinstance(bad, ValueError)
    assert advance(Part("b", row(0)), Part("a", row(0))) == [3, 2]  # a and b are as they were
    assert advance(Part("a", row(5), start=True)) == [5]  # begins anew in its slot
    assert advance(Part("a", row(0), end=True)) == [5] and sequences.live == 1
    assert isinstance(advance(Part("a", row(0)))[0], LookupError)
    clock.now += 9
    assert advance(Part("a", row(6), start=True)) == [6]
    clock.now += 1
    assert advance(Part("d", row(7), start=True)) == [7] and sequences.counters.evicted == 1  # b was idle
    assert "evicted after 10 s" in str(advance(Part("b", row(0)))[0])
    (failed,) = advance(Part("d", row(62)))
    assert isinstance(failed, FloatingPointError) and sequences.live == 1 == pool.free


def test_parts_of_any_length_together_are_those_alone(file):
    stock, pool = OnnxRuntimeBackend(file, threads=1), StatePool(file, 3, threads=1, chunk=4)
    sequences, random = Sequences(pool, idle_seconds=60, vocab=VOCAB), np.random.default_rng(1)
    read: dict[int, list[int]] = {}
    for _ in range(40):
        keys = [*read, *(key for key in random.integers(1000, size=3 - len(read)).tolist() if key not in read)]
        keys = [key for key in keys if random.random() < 0.7]
        parts = [
            Part(key, random.integers(VOCAB, size=random.integers(1, 11)), key not in read, bool(random.random() < 0.3))
            for key in dict.fromkeys(keys)
        ]
        for part, logits in zip(parts, sequences.advance(parts)):
            read.setdefault(part.key, []).extend(part.tokens.tolist())
            want, _ = stock(np.array([read[part.key]]), None)
            assert np.abs(logits - want[0, -1]).max() < 1e-4
            if part.end:
                del read[part.key]
        assert sequences.live == len(read) == 3 - pool.free


def test_norms_are_those_of_the_recurrent_states_and_a_state_that_is_not_finite_is_seen_at_once(file):
    model, pool = small(HYBRID), StatePool(file, 4, threads=1)
    slots, prompts = [pool.open() for _ in range(4)], np.arange(12).reshape(4, 3)
    pool.run(slots, prompts)
    _, state = model.prefill(torch.from_numpy(prompts))
    want = state_norms(state).numpy()
    assert want.shape == (4, 1) and np.allclose(pool.norms(slots), want, rtol=1e-4)
    assert np.allclose(pool.norms([slots[3], slots[1]]), want[[3, 1]], rtol=1e-4)
    assert np.allclose(state_norms(state[0].recurrent).numpy(), want[:, 0])
    backend = OnnxRuntimeBackend(file, threads=1)
    assert np.allclose(backend.state_norms(backend(prompts, None)[1]), want, rtol=1e-4)
    assert np.allclose(TorchBackend(model).state_norms(state), want)
    sequences = Sequences(StatePool(file, 2, threads=1), idle_seconds=60, vocab=VOCAB)
    sequences.advance([Part("a", row(1), start=True), Part("b", row(2), start=True)])
    recurrent = [i for i, x in enumerate(sequences._pool._past) if x.name.endswith("recurrent")]
    sequences._pool._states[recurrent[0]][0] = 3e38  # finite; after one more token it may be, its norm is not
    lost, going_on = sequences.advance([Part("a", row(1)), Part("b", row(2))])
    assert "finite state" in str(lost) and going_on.shape == (VOCAB,) and sequences.live == 1


@pytest.mark.parametrize("library", [True, False])
def test_rows_of_a_pool_move_without_a_trace(file, library):
    stock, pool = OnnxRuntimeBackend(file, threads=1), StatePool(file, 6, threads=1, library=library)
    random, live = np.random.default_rng(2), []
    for _ in range(60):
        if pool.free and random.random() < 0.4:
            live.append((pool.open(), []))
        if live and random.random() < 0.2:
            slot, _ = live.pop(random.integers(len(live)))
            pool.close(slot)
            for state in pool._states:  # whatever a sequence leaves behind, the next one must not see
                state[6 - pool.free :] = np.nan if state.dtype == np.float32 else -1
        some = [live[i] for i in random.permutation(len(live))[: random.integers(len(live) + 1)]]
        if some:
            tokens = random.integers(VOCAB, size=(len(some), random.choice([1, 1, 3])))
            for (_, read), new, logits in zip(some, tokens, pool.run([slot for slot, _ in some], tokens)):
                read.extend(new.tolist())
                assert np.abs(logits - stock(np.array([read]), None)[0][0, -1]).max() < 1e-4


def test_a_pool_is_full_and_its_slots_are_used_once(file):
    pool = StatePool(file, 1, threads=1)
    slot = pool.open()
    with pytest.raises(SlotsExhausted, match="all 1 in use"):
        pool.open()
    with pytest.raises(ValueError, match=r"shape \(1, T\)"):
        pool.run([slot], np.zeros((2, 1), np.int64))
    pool.close(slot)
    for call in (lambda: pool.close(slot), lambda: pool.run([slot], np.zeros((1, 1), np.int64))):
        with pytest.raises(ValueError, match="closed"):
            call()
    two = StatePool(file, 2, threads=1)
    slot = two.open()
    with pytest.raises(ValueError, match="distinct slots"):
        two.run([slot, slot], np.zeros((2, 1), np.int64))


LATE = """<ir_version: 9, opset_import: ["" : 18]> late (int64[batch, sequence] input_ids, float[batch, 4] past)
=> (float[batch, sequence, 4] logits, float[batch, 4] present) <float[1] one = {1.0}, int64[1] axis = {1}> {
  present = Add (past, one)
  product = Mul (past, present)
  row = Unsqueeze (product, axis)
  shape = Shape (input_ids)
  four = Constant <value_ints = [4]> ()
  wide = Concat <axis = 0> (shape, four)
  logits = Expand (row, wide)
}"""


def test_a_file_that_reads_its_state_late_is_refused(tmp_path):
    onnx.save(onnx.parser.parse_model(LATE), tmp_path / "late.onnx")
    with pytest.raises(ValueError, match="past and present in one buffer"):
        StatePool(tmp_path / "late.onnx", 2, library=False)
