"""A training run that stops and resumes ends with the bytes of an unbroken one; tokens on disk are checked as read."""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gdn2_ops.model import GDN2LM

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import token_shards
import train
from token_shards import TokenShards
from training_checks import CUT


def shards(folder: Path, *sizes: int, vocab_size: int = 50) -> Path:
    random = np.random.default_rng(0)
    return token_shards.write(folder, [random.integers(vocab_size, size=n) for n in sizes], vocab_size=vocab_size)


def trained(out: Path, data: Path, *more: str) -> bytes | None:
    """The bytes of the model that a run of six steps writes."""
    sizes = ["--steps", "6", "--batch", "2", "--accumulate", "2", "--length", "12", "--lr", "0.01", "--log-every", "2"]
    train.main(["--preset", "gdn2-1.3b", "--set", *CUT, "--data", str(data), "--out", str(out), *sizes, *more])
    weights = out / "model.safetensors"
    return weights.read_bytes() if weights.is_file() else None


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return shards(tmp_path_factory.mktemp("tokens"), 100, 5, 40)


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("unbroken")
    assert trained(out, data) is not None
    return out


def test_a_run_that_stops_and_resumes_ends_with_the_same_bytes(data, unbroken, tmp_path, capsys):
    assert trained(tmp_path, data, "--stop-at", "4", "--save-every", "1") is None
    ended = trained(tmp_path, data, "--resume")
    assert ended == (unbroken / "model.safetensors").read_bytes()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("step")] == [f"step {i}" for i in (1, 2, 3, 4, 6)]
    assert all("tokens/s" in line and "GiB" in line for line in lines if line.startswith("step"))
    assert GDN2LM.from_pretrained(tmp_path).config.num_layers == 2


def test_accumulated_rows_are_a_larger_batch(data, tmp_path, monkeypatch):
    """One step of two forwards has the gradient of one forward with all the rows: AdamW's first moment is a tenth."""
    of_forward = train.batch_of
    trained(tmp_path / "two", data, "--steps", "1", "--clip", "1e9")

    def all_rows(tokens, options, step, i):
        options = argparse.Namespace(**vars(options) | {"batch": 2})
        return torch.cat([of_forward(tokens, options, step, i) for i in range(2)])

    monkeypatch.setattr(train, "batch_of", all_rows)
    trained(tmp_path / "one", data, "--steps", "1", "--clip", "1e9", "--batch", "4", "--accumulate", "1")
    two, one = (
        torch.load(tmp_path / name / train.CHECKPOINT, weights_only=True)["optimizer"]["state"]
        for name in ("two", "one")
    )
    assert two.keys() == one.keys() and len(two) > 10
    for name, state in two.items():
        torch.testing.assert_close(state["exp_avg"], one[name]["exp_avg"], rtol=1e-4, atol=1e-7)


def test_each_forward_of_a_step_reads_rows_of_its_own(data):
    options = train.parser().parse_args(["--data", "x", "--out", "x", "--batch", "2", "--length", "12"])
    tokens = TokenShards(data, vocab_size=50, length=13)
    rows = [train.batch_of(tokens, options, 3, i) for i in range(2)]
    assert not torch.equal(*rows) and torch.equal(rows[1], train.batch_of(tokens, options, 3, 1))
    assert rows[0].shape == (2, 13) and not torch.equal(rows[0], train.batch_of(tokens, options, 4, 0))


def test_arithmetic_in_bfloat16_keeps_parameters_in_float32(data, tmp_path):
    got = trained(tmp_path, data, "--dtype", "bfloat16", "--steps", "3")
    assert got is not None
    weights = GDN2LM.from_pretrained(tmp_path)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in weights.parameters())
    saved = torch.load(tmp_path / train.CHECKPOINT, weights_only=True)
    assert saved["step"] == 3 and saved["options"]["dtype"] == "bfloat16"


def test_the_loss_falls(tmp_path):
    data, losses = token_shards.write(tmp_path / "data", [np.tile(np.arange(7), 60)], vocab_size=50), []
    sizes = ["--steps", "40", "--batch", "4", "--length", "16", "--lr", "0.02"]
    arguments = ["--preset", "tiny", "--set", *CUT, "--data", str(data), "--out", str(tmp_path / "run"), *sizes]
    train.run(train.parser().parse_args(arguments), lambda step, model, loss: losses.append(loss))
    assert losses[0] == pytest.approx(math.log(50), rel=0.3) and losses[-1] < 0.5 * losses[0] and len(losses) == 40


@pytest.mark.parametrize(
    "more, error, text",
    [
        (["--resume"], FileExistsError, "expected a checkpoint"),
        (["--set", "layers=2"], ValueError, r"names among .*got \['layers'\]"),
        (["--set", *CUT, "vocab_size=49"], ValueError, "at most the model's 49 token ids, got vocab_size 50"),
        (["--length", "200"], ValueError, "a shard of at least 201 tokens, got 100 in the longest"),
        (["--data", "nowhere"], FileNotFoundError, r"tokens\.json"),
        (["--fsdp"], ValueError, "expected --fsdp and torchrun together, got one process"),
    ],
)
def test_what_does_not_fit_is_refused(data, tmp_path, more, error, text):
    with pytest.raises(error, match=text):
        trained(tmp_path, data, *more)


def test_a_run_is_not_written_over_and_goes_on_as_it_began(data, unbroken):
    with pytest.raises(FileExistsError, match="expected no checkpoint"):
        trained(unbroken, data)
    with pytest.raises(ValueError, match=r"options of this run, got \{'lr': 0.01\}"):
        trained(unbroken, data, "--resume", "--lr", "0.02")


def test_windows_are_those_of_the_shards(data):
    tokens = TokenShards(data, vocab_size=50, length=13)
    first, _, last = (np.fromfile(data / f"0000{i}.bin", "<u2") for i in range(3))
    assert len(tokens) == 88 + 28 and tokens.tokens == 145
    for i, want in ((0, first[:13]), (87, first[87:]), (88, last[:13]), (115, last[27:])):
        assert tokens.window(i).dtype == np.int64 and np.array_equal(tokens.window(i), want)


def test_tokens_that_are_not_what_the_index_says_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"0\.\.9, got 3\.\.10"):
        token_shards.write(tmp_path, [np.array([3, 10])], vocab_size=10)
    folder = shards(tmp_path / "wrong", 30)
    index = json.loads((folder / token_shards.INDEX).read_text())

    def opened(**changes):
        (folder / token_shards.INDEX).write_text(json.dumps(index | changes))
        return TokenShards(folder, vocab_size=50, length=5)

    for changes, text in (
        ({"dtype": "float32"}, "uint16 or uint32, got 'float32'"),
        ({"dtype": "uint32"}, "expected 120 bytes, 30 tokens of uint32, got 60"),
        ({"vocab_size": 60}, "at most the model's 50 token ids"),
    ):
        with pytest.raises(ValueError, match=text):
            opened(**changes)
    with pytest.raises(FileNotFoundError, match=r"other\.bin"):
        opened(shards=[{"file": "other.bin", "tokens": 1}])
    del index["dtype"]
    with pytest.raises(ValueError, match=r"none of \['dtype'\]"):
        opened()
    index["dtype"] = "uint16"
    np.array([1, 2, 3, 50, 4, 5], "<u2").tofile(folder / "00000.bin")
    index["shards"][0]["tokens"] = 6
    with pytest.raises(ValueError, match="ids below 50, got 50 at 3"):
        opened().window(0)
    assert token_shards.write(tmp_path / "wide", [np.array([70_000])], vocab_size=70_001)
    assert (tmp_path / "wide" / "00000.bin").stat().st_size == 4
