"""Tasks that ask a fixed-size state for what it has read: associative recall, and needles in real text.

    batch = recall(64, 256, pairs=32, seed=0)  # multi-query associative recall
    batch = needles(16, 512, "mk-niah-1", text, seed=0)  # retrieval from a text of any length, `corpus` has one
    exact_match(model(batch.tokens).argmax(-1), batch.targets)

Everything is made from a seed, at any length. A target stands where the model has read all that comes before it: the
prediction at that position is compared. Positions that ask nothing hold `NOT_ASKED`, which cross_entropy ignores.
"""

from __future__ import annotations

import functools
import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

NOT_ASKED = -100  # the ignore_index of torch.nn.functional.cross_entropy
NEW_LINE = 10
NOISE = b"The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"


class Batch(NamedTuple):
    """tokens: [B, T] int64. targets: [B, T] int64, the token that follows, or `NOT_ASKED`."""

    tokens: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Vocabulary:
    """Tokens of `recall`: keys first, then values, then fillers, which mean nothing."""

    keys: int = 128
    values: int = 128
    fillers: int = 16

    @property
    def size(self) -> int:
        return self.keys + self.values + self.fillers


def recall(
    batch: int,
    length: int,
    pairs: int,
    *,
    rewrites: int = 0,
    vocabulary: Vocabulary = Vocabulary(),
    power: float = 0.01,
    seed: int,
) -> Batch:
    """Multi-query associative recall: key value key value ..., then each key once more, where its value is asked for.

    Source: Arora et al. 2023 (Zoology), arXiv 2312.04927, section 4: keys of a row are distinct, and the distances
    of the questions follow a power law. Rewrites are ours: a key gets a new value, and the newest one is the answer.

    Args:
        batch, length: B, T.
        pairs: distinct keys of a row.
        rewrites: pairs more, whose keys are drawn from the same ones, anywhere among the others.
        vocabulary: how many tokens of each kind there are.
        power: a of the density a x^(a - 1) of the distances, in (0, 1]; 1 is uniform.
        seed: of everything.

    Returns: a `Batch` with `pairs` questions a row; between the questions stand fillers.
    Raises: ValueError: the pairs and their questions do not fit into the length, or the keys into the vocabulary.
    """
    written = pairs + rewrites
    places = (length - 2 * written) // 2
    if pairs < 1 or rewrites < 0 or places < pairs:
        raise ValueError(
            f"expected pairs >= 1, rewrites >= 0 and a length of at least 4 * pairs + 2 * rewrites, "
            f"got pairs = {pairs}, rewrites = {rewrites}, length = {length}"
        )
    if pairs > vocabulary.keys:
        raise ValueError(f"expected at most {vocabulary.keys} pairs, the keys of the vocabulary, got {pairs}")
    generator = torch.Generator().manual_seed(seed)
    keys_BP = _distinct(batch, vocabulary.keys, pairs, generator)
    which_BW = torch.randint(pairs, (batch, written), generator=generator)
    which_BW[:, :pairs] = torch.arange(pairs)
    which_BW = which_BW.gather(1, _distinct(batch, written, written, generator))  # in any order
    values_BW = vocabulary.keys + torch.randint(vocabulary.values, (batch, written), generator=generator)

    first_filler = vocabulary.keys + vocabulary.values
    tokens = first_filler + torch.randint(vocabulary.fillers, (batch, length), generator=generator)
    tokens[:, 0 : 2 * written : 2] = keys_BP.gather(1, which_BW)
    tokens[:, 1 : 2 * written : 2] = values_BW

    density = (1 + torch.arange(places, dtype=torch.float64)) ** (power - 1)
    at_BP = 2 * written + 2 * torch.multinomial(density.expand(batch, -1), pairs, generator=generator)
    tokens.scatter_(1, at_BP, keys_BP)
    newest_BP = ((which_BW[:, None] == torch.arange(pairs)[:, None]) * torch.arange(1, written + 1)).argmax(-1)
    targets = torch.full_like(tokens, NOT_ASKED)
    targets.scatter_(1, at_BP, values_BW.gather(1, newest_BP))
    return Batch(tokens, targets)


@dataclass(frozen=True)
class Needle:
    """haystack: "text" or "noise". value: "number", "word" or "uuid". keys: needles in a row, one of them asked for."""

    haystack: str
    value: str
    keys: int = 1


NEEDLES = {
    "s-niah-1": Needle("noise", "number"),  # the passkey
    "s-niah-2": Needle("text", "number"),
    "s-niah-3": Needle("text", "uuid"),
    "s-niah-word": Needle("text", "word"),
    "mk-niah-1": Needle("text", "number", keys=4),
}


def needles(batch: int, length: int, kind: str, text: bytes, *, digits: int = 7, words: int = 0, seed: int) -> Batch:
    """A haystack in which lines `# key value` are hidden, and at its end `# key ` once more and the value.

    Source: Hsieh et al. 2024 (RULER), arXiv 2404.06654, tasks S-NIAH-1 to 3 and MK-NIAH-1, with a short line of
    Python in place of an English sentence and `text` in place of essays; S-NIAH with words for values is ours. The
    keys and the words are words of `text`.

    Args:
        batch, length: B, T: tokens with the question and its answer.
        kind: a name in `NEEDLES`.
        text: the haystack; a row begins anywhere in it. Needles stand between lines, where there are lines.
        digits: of a number; a uuid has 32 hexadecimal digits.
        words: 0 makes bytes, tokens below 256; else words are one token each, `tokens_of(text, words)`, and the tokens
            are below 256 + words. A number or uuid is a token for each digit either way.
        seed: of everything.

    Returns: a `Batch`; the value and the end of its line are asked for.
    Raises: ValueError: there is no such kind, or the length leaves no room for a haystack.
    """
    if kind not in NEEDLES:
        raise ValueError(f"expected a kind in {sorted(NEEDLES)}, got {kind!r}")
    needle, chance = NEEDLES[kind], random.Random(seed)
    hay, names = _haystack(text if needle.haystack == "text" else NOISE * (1 + length // 20), words), words_of(text)
    rows, asked = zip(*(_needle_row(length, needle, hay, names, digits, words, chance) for _ in range(batch)))
    seen = torch.tensor(rows)
    targets = seen[:, 1:].clone()
    for target_T, answer in zip(targets, asked):
        target_T[: length - answer] = NOT_ASKED
    return Batch(seen[:, :-1].contiguous(), targets)


def exact_match(predicted: Tensor, targets: Tensor) -> float:
    """The share of answers of which every token is right: neighbouring targets of a row are one answer.

    Greedy decoding of an answer is right exactly if each of its tokens is, after the right ones before it.

    Args: predicted [B, T], targets [B, T] of a `Batch`.
    Raises: ValueError: nothing is asked.
    """
    asked_BT = targets != NOT_ASKED
    begins_BT = asked_BT.clone()
    begins_BT[:, 1:] &= ~asked_BT[:, :-1]
    answers = int(begins_BT.sum())
    if not answers:
        raise ValueError("expected targets that ask for something, got NOT_ASKED everywhere")
    answer_of = begins_BT.flatten().cumsum(0) - 1
    wrong = (asked_BT & (predicted != targets)).flatten()
    return 1 - len(answer_of[wrong].unique()) / answers


@functools.lru_cache(maxsize=2)  # a text to learn from and one held out
def words_of(text: bytes) -> Sequence[bytes]:
    """The distinct words of four to eight small letters, sorted."""
    return sorted(set(re.findall(rb"\b[a-z]{4,8}\b", text)))


def tokens_of(text: bytes, words: int = 0) -> Sequence[int]:
    """The bytes of text; with words > 0, two or more letters and a space after them are 256 + a hash below `words`."""
    if not words:
        return list(text)
    found = re.findall(rb"[A-Za-z_]{2,} ?|.", text, re.DOTALL)
    return [piece[0] if len(piece) == 1 else 256 + zlib.crc32(piece) % words for piece in found]


_haystack = functools.lru_cache(maxsize=4)(tokens_of)


def _needle_row(
    length: int,
    needle: Needle,
    hay: Sequence[int],
    names: Sequence[bytes],
    digits: int,
    words: int,
    chance: random.Random,
) -> tuple[list[int], int]:
    """length + 1 tokens and how many of the last ones are the answer."""
    keys = chance.sample(names, needle.keys)
    values = [_value(needle.value, names, digits, words, chance) for _ in keys]
    lines = [[*tokens_of(b"# %s " % key, words), *value, NEW_LINE] for key, value in zip(keys, values)]
    asked = chance.randrange(needle.keys)
    room = length + 1 - sum(map(len, lines)) - len(lines[asked])
    if room < 0 or room > len(hay):
        raise ValueError(
            f"expected a length that leaves 0 to {len(hay)} tokens of haystack, got {length}: {room} are left"
        )
    begin = chance.randrange(len(hay) - room + 1)
    straw = hay[begin : begin + room]
    breaks = [i + 1 for i, token in enumerate(straw) if token == NEW_LINE] or range(room + 1)
    row, last = [], 0
    for depth, line in zip(sorted(chance.choice(breaks) for _ in lines), lines):
        row += [*straw[last:depth], *line]
        last = depth
    return [*row, *straw[last:], *lines[asked]], len(values[asked]) + 1


def _value(kind: str, names: Sequence[bytes], digits: int, words: int, chance: random.Random) -> Sequence[int]:
    if kind == "word":
        return tokens_of(chance.choice(names), words)
    alphabet, size = (b"0123456789", digits) if kind == "number" else (b"0123456789abcdef", 32)
    return chance.choices(alphabet, k=size)


def _distinct(batch: int, upto: int, count: int, generator: torch.Generator) -> Tensor:
    """[batch, count] int64, distinct in each row, each below upto."""
    return torch.rand(batch, upto, generator=generator).argsort(-1)[:, :count]
