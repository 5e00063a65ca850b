"""The tasks of `gdn2_ops.tasks`, solved by hand: whoever reads a row as its docstring says finds every answer."""

import pytest
import torch

from gdn2_ops import corpus, tasks
from gdn2_ops.tasks import NEEDLES, NOT_ASKED, Vocabulary, exact_match, needles, recall

SMALL = Vocabulary(keys=20, values=9, fillers=3)
WORDS = 500


@pytest.fixture(scope="module")
def text():
    return corpus.held_out_text(64 * 1024)


def solved(batch: tasks.Batch, written: int) -> torch.Tensor:
    """The newest value of each key that stands after the pairs."""
    predicted = torch.full_like(batch.targets, NOT_ASKED)
    for row, tokens in enumerate(batch.tokens.tolist()):
        memory = dict(zip(tokens[0 : 2 * written : 2], tokens[1 : 2 * written : 2]))
        for t in range(2 * written, len(tokens)):
            predicted[row, t] = memory.get(tokens[t], NOT_ASKED)
    return predicted


@pytest.mark.parametrize("pairs, rewrites, length", [(1, 0, 4), (6, 0, 24), (6, 5, 200), (20, 10, 100)])
def test_recall_is_solved_by_a_dictionary(pairs, rewrites, length):
    batch = recall(5, length, pairs, rewrites=rewrites, vocabulary=SMALL, seed=3)
    assert batch.tokens.shape == batch.targets.shape == (5, length) and batch.tokens.dtype == torch.int64
    assert int(batch.tokens.min()) >= 0 and int(batch.tokens.max()) < SMALL.size
    assert torch.equal(solved(batch, pairs + rewrites), batch.targets)  # and nothing else is asked
    assert (batch.targets != NOT_ASKED).sum(1).tolist() == [pairs] * 5


def test_keys_are_distinct_and_rewrites_reach_them():
    batch = recall(400, 60, 4, rewrites=8, vocabulary=SMALL, seed=0)
    keys = batch.tokens[:, 0:24:2]
    assert {len(set(row)) for row in keys.tolist()} == {4}
    asked = batch.tokens[batch.targets != NOT_ASKED].view(400, 4)
    assert torch.equal(asked.sort(-1).values, torch.stack([row.unique() for row in keys]))
    newest_is_first_written = torch.tensor([len(set(row[:4])) == 4 for row in keys.tolist()]).float().mean()
    assert newest_is_first_written < 0.5  # the order of pairs and rewrites is drawn


def test_the_power_law_asks_soon():
    def middle(power):
        asked = recall(200, 400, 4, vocabulary=SMALL, power=power, seed=1).targets != NOT_ASKED
        return asked.nonzero()[:, 1].double().median()

    assert middle(0.01) < 60 < 150 < middle(1.0)


def test_recall_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"got pairs = 5, rewrites = 2, length = 23"):
        recall(1, 23, 5, rewrites=2, seed=0)
    with pytest.raises(ValueError, match="at most 20 pairs"):
        recall(1, 400, 21, vocabulary=SMALL, seed=0)


def read(batch: tasks.Batch, row: int) -> tuple[list[int], list[int]]:
    """The tokens of a row with the last answer token at their end, and the answer."""
    answer = batch.targets[row][batch.targets[row] != NOT_ASKED].tolist()
    return [*batch.tokens[row].tolist(), batch.targets[row, -1].item()], answer


@pytest.mark.parametrize("words", [0, WORDS])
@pytest.mark.parametrize("kind", NEEDLES)
def test_a_needle_is_found_by_searching(kind, words, text):
    batch = needles(6, 300, kind, text, words=words, seed=5)
    assert batch.tokens.shape == batch.targets.shape == (6, 300)
    for row in range(6):
        seen, answer = read(batch, row)
        assert seen[-len(answer) :] == answer and answer[-1] == tasks.NEW_LINE
        question = seen[: -len(answer)]
        begin = max(i for i, token in enumerate(question) if token == ord("#"))  # "# key "
        line = [*question[begin:], *answer]
        found = [i for i in range(len(seen)) if seen[i : i + len(line)] == line]
        assert len(found) == 2 and found[1] == begin  # the needle, and the question itself
        assert seen[found[0] - 1] == tasks.NEW_LINE or found[0] == 0


def test_needles_are_of_the_kinds_that_they_say(text):
    lengths = {kind: len(read(needles(1, 400, kind, text, seed=0), 0)[1]) - 1 for kind in NEEDLES}
    assert (lengths["s-niah-1"], lengths["s-niah-2"], lengths["mk-niah-1"], lengths["s-niah-3"]) == (7, 7, 7, 32)
    noise, many = (bytes(needles(1, 600, kind, text, seed=0).tokens[0].tolist()) for kind in ("s-niah-1", "mk-niah-1"))
    assert noise.count(b"The grass is green.") >= 4
    lines = [line for line in many.split(b"\n") if line.startswith(b"# ") and line[-7:].isdigit()]
    assert len(lines) == 4 and len({line.split()[1] for line in lines}) == 4


def test_hay_is_the_text_and_the_depth_is_drawn(text):
    rows = [bytes(row) for row in needles(60, 500, "s-niah-2", text, seed=2).tokens.tolist()]
    depths = []
    for row in rows:
        key = row[row.rindex(b"# ") :][:-7]
        at = row.index(key)
        assert row[:at] in text
        depths.append(at / 500)
    assert min(depths) < 0.1 and max(depths) > 0.8


def test_words_are_one_token_each():
    assert tasks.tokens_of(b"ab1") == [97, 98, 49]
    ids = tasks.tokens_of(b"import os\nx = import 12", WORDS)
    assert len(ids) == 10 and ids[0] == ids[7] != ids[1] and 256 <= min(ids[0], ids[1]) <= max(ids) < 256 + WORDS
    assert bytes(ids[2:7] + ids[8:]) == b"\nx = 12"


@pytest.mark.parametrize(
    "make",
    [lambda seed, text: recall(3, 60, 8, seed=seed), lambda seed, text: needles(3, 200, "mk-niah-1", text, seed=seed)],
)
def test_a_seed_is_a_batch(make, text):
    first, again, other = make(7, text), make(7, text), make(8, text)
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.targets, again.targets)
    assert not torch.equal(first.tokens, other.tokens)


def test_needles_refuse_what_does_not_fit(text):
    with pytest.raises(ValueError, match=r"expected a kind in .*'s-niah-1'.*, got 'needle'"):
        needles(1, 100, "needle", text, seed=0)
    with pytest.raises(ValueError, match="got 20"):
        needles(1, 20, "s-niah-2", text, seed=0)
    with pytest.raises(ValueError, match="tokens of haystack"):
        needles(1, 1000, "s-niah-2", text[:500], seed=0)


def test_an_answer_is_right_or_wrong_as_a_whole():
    n = NOT_ASKED
    targets = torch.tensor([[n, 4, 5, n, 6, 6], [7, n, n, 8, 9, n]])  # answers 4 5, 6 6, 7, 8 9
    assert exact_match(targets, targets) == 1
    assert exact_match(torch.zeros_like(targets), targets) == 0
    predicted = torch.tensor([[1, 4, 0, 1, 6, 6], [7, 1, 1, 0, 0, 1]])
    assert exact_match(predicted, targets) == 0.5
    with pytest.raises(ValueError, match="NOT_ASKED everywhere"):
        exact_match(targets, torch.full_like(targets, n))


def test_answers_do_not_run_on_into_the_next_row():
    n = NOT_ASKED
    targets = torch.tensor([[n, 4], [5, n]])
    assert exact_match(torch.tensor([[0, 4], [0, 0]]), targets) == 0.5
