"""Generation and scoring over any backend, and the comparison that must notice a backend that differs."""

import math

import numpy as np
import pytest

from gdn2_ops.runtime.compare import Task, Tolerance, disagreements, measure, some_logits, table
from gdn2_ops.runtime.generate import bits_per_byte, generate, log_softmax, tokens_of, windows_of

TASK = Task(prompt=b"abcabc", text=bytes(range(97, 123)) * 4, count=12, window=8)


class Alphabet:
    """A backend that expects the next letter of a ring of `period`, with log-odds `certainty`."""

    def __init__(self, period: int = 3, certainty: float = 9.0) -> None:
        self.period, self.certainty = period, certainty

    def __call__(self, tokens, state):
        logits = np.zeros((*tokens.shape, 256), np.float32)
        following = 97 + (tokens - 97 + 1) % self.period
        np.put_along_axis(logits, following[..., None], self.certainty, -1)
        return logits, (state or 0) + 1


def test_generate_feeds_back_what_it_writes():
    assert b"".join(generate(Alphabet(), b"xab", 7)) == b"cabcabc"
    assert list(generate(Alphabet(), b"a", 0)) == []
    with pytest.raises(ValueError, match="at least one byte"):
        list(generate(Alphabet(), b"", 3))


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_bits_per_byte_is_the_cross_entropy(batch):
    text = b"abc" * 50
    assert bits_per_byte(Alphabet(certainty=0.0), text, window=10, batch=batch) == pytest.approx(8)
    p = math.exp(9) / (math.exp(9) + 255)
    assert bits_per_byte(Alphabet(), text, window=10, batch=batch) == pytest.approx(-math.log2(p))
    wrong = bits_per_byte(Alphabet(), b"a" * 150, window=10, batch=batch)
    assert wrong == pytest.approx(-math.log2((1 - p) / 255))


def test_windows_are_whole_and_probabilities_sum_to_one():
    assert windows_of(b"abcdefgh", 3).tolist() == [[97, 98, 99], [100, 101, 102]]
    with pytest.raises(ValueError, match="at least one window of 9 bytes, got 8"):
        windows_of(b"abcdefgh", 9)
    assert tokens_of(b"\x00\xff").tolist() == [0, 255]
    log_p = log_softmax(np.array([[1e4, 0.0, -1e4]], np.float32))
    assert np.exp(log_p).sum() == pytest.approx(1) and np.isfinite(log_p).all()


def test_backends_that_agree_pass_and_every_other_is_named():
    truth = some_logits(Alphabet(), TASK)
    rows = [measure("first", Alphabet(), TASK, None), measure("same", Alphabet(), TASK, truth)]
    assert disagreements(rows) == []
    assert rows[1].generated == b"abcabcabcabc" and rows[1].logits_difference == 0
    assert rows[0].prefill_per_s > 0 and rows[0].decode_per_s > 0
    other = measure("other text", Alphabet(period=4), TASK, truth)
    louder = measure("other logits", Alphabet(certainty=9.01), TASK, truth)
    broken = measure("not a number", Alphabet(certainty=float("nan")), TASK, truth)
    found = "\n".join(disagreements([*rows, other, louder, broken]))
    assert "other text writes other bytes than first, from byte 0 on" in found
    assert "other logits: logits differ from first by 1.0e-02 > 1e-03" in found
    assert "other text: bits per byte differ from first by" in found
    rough = Tolerance(logits=1e2, bits=1e2, same_bytes=False)
    assert [line.split(":")[0] for line in disagreements([*rows, other, broken], rough)] == ["not a number"] * 2
    assert "not a number: logits differ" in found
    assert [line.split()[0] for line in table(rows).splitlines()] == ["backend", "first", "same"]
