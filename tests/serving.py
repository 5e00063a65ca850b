"""On the real server: every way to ask gives the bytes of eager PyTorch, for one sequence and for many at once.

Run by `make test-server`, which makes the environment of the server.
"""

import time
from functools import partial

import numpy as np
import pytest
from serving_fixtures import (
    EAGER,
    ROOT,
    SECRETS,
    WAYS,
    at_once,
    becomes,
    eager,
    metric,
    repository,
    server,
    tensors,
)
from tritonclient import grpc

from gdn2_ops import cli
from gdn2_ops.export.repository_check import problems
from gdn2_ops.runtime.client import Client
from gdn2_ops.runtime.compare import Task, disagreements, measure, some_logits
from gdn2_ops.runtime.generate import log_softmax
from gdn2_ops.runtime.served import measure_served

__all__ = ["repository", "server"]  # fixtures

TEXT = (ROOT / "gdn2_ops" / "model.py").read_bytes()


def test_the_repository_has_no_problems_and_the_server_is_ready_soon(repository, server):
    assert problems(repository) == []
    assert server.ready_seconds < 15
    assert {"gdn2_decode", "gdn2_generate", "gdn2_score", "gdn2_step"} <= set(Client(server.http).canary())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("length, count", [(1, 30), (7, 30), (300, 5), (1100, 5)])
def test_one_sequence_is_that_of_eager(way, length, count, server):
    assert WAYS[way](server, TEXT[:length], count, 10 + length) == eager(TEXT[:length], count)


@pytest.mark.parametrize("way", WAYS)
def test_sixty_four_sequences_at_once_are_those_of_eager(way, server):
    """Of different lengths, each with a secret of its own before it."""
    prompts = [
        secret.encode() + TEXT[i : 3 * i + 1] + f"print(password_{i:03d}".encode() for i, secret in enumerate(SECRETS)
    ]
    counts = [3 + i * 5 % 23 for i in range(64)]
    calls = [partial(WAYS[way], server, p, n, 1000 + i) for i, (p, n) in enumerate(zip(prompts, counts))]
    assert at_once(calls) == [eager(p, n) for p, n in zip(prompts, counts)]
    for model, slots in (("gdn2_generate", 64), ("gdn2_decode", 128)):
        assert becomes(partial(metric, server, "gdn2_slots_free", model), slots)
        assert metric(server, "gdn2_sequences_live", model) == 0


def test_text_comes_in_characters_and_bytes_in_tokens(server):
    parts = list(Client(server.http).stream(text="naïve = 'é", count=40))
    written = eager("naïve = 'é".encode(), 40)
    assert bytes(token for part in parts for token in part["tokens"]) == written
    assert "".join(part["text"] for part in parts) == written.decode(errors="replace")


def test_a_sequence_takes_parts_of_any_length_and_begins_anew(server):
    client = Client(server.http)
    client.advance(77, list(b"something else"), start=True)
    for _ in range(2):  # START on a live sequence drops what it had read
        for at, part in enumerate((b"d", b"ef __init__", b"(self", b", x)")):
            token = client.advance(77, list(part), start=at == 0)
    assert bytes([token]) == eager(b"def __init__(self, x)", 1)
    client.advance(77, [0], end=True)


def test_scores_are_those_of_eager_and_come_from_the_cache(server):
    client, texts = Client(server.http), [TEXT[: 1 + 37 * i] for i in range(8)]
    hits = metric(server, "nv_cache_num_hits_per_model", "gdn2_score")
    for _ in range(2):
        got = at_once(
            [partial(client.infer, "gdn2_score", {"tokens": ("INT32", [1, len(text)], list(text))}) for text in texts]
        )
        for text, answer in zip(texts, got):
            logits, _ = EAGER(np.frombuffer(text, np.uint8).astype(np.int64)[None], None)
            want = np.take_along_axis(log_softmax(logits[0, :-1]), np.frombuffer(text, np.uint8)[1:, None], -1)[:, 0]
            assert answer["log_p"][0] == 0 and np.abs(np.array(answer["log_p"][1:]) - want).max(initial=0) < 1e-4
    assert metric(server, "nv_cache_num_hits_per_model", "gdn2_score") >= hits + len(texts)


def test_what_demo_prints_of_a_server_is_that_of_eager(server):
    task = Task(prompt=TEXT[:100], text=TEXT[100:2200], count=20)
    want = measure("eager", EAGER, task, None)
    got = measure_served("served", Client(server.http), task, some_logits(EAGER, task))
    assert not disagreements([want, got])
    assert got.bits_per_byte != want.bits_per_byte or got.logits_difference > 0  # it is another implementation
    assert 0 < got.prefill_per_s < 1e7 and 0 < got.decode_per_s < 1e6
    off = measure_served("served", Client(server.http), task, some_logits(EAGER, task) + np.float32(0.01))
    assert "logits differ" in disagreements([want, off])[0]


def test_a_state_that_travels_writes_the_bytes_of_eager(server):
    prompt, count = b"for i in ", 20
    with grpc.InferenceServerClient(server.grpc) as client:
        config = client.get_model_config("gdn2_step", as_json=True)["config"]
        sizes = {x["name"]: [int(size) for size in x["dims"]] for x in config["input"] if x["name"] != "input_ids"}
        values = {name: np.zeros([1, *size], np.float32) for name, size in sizes.items()}
        tokens, written = list(prompt), []
        for _ in range(count):
            answer = client.infer("gdn2_step", tensors({"input_ids": np.array([tokens], np.int64)} | values))
            values = {name: answer.as_numpy(name.replace("past", "present")) for name in sizes}
            tokens = [int(answer.as_numpy("logits")[0, -1].argmax())]
            written += tokens
    assert bytes(written) == eager(prompt, count)


def test_metrics_count_tokens_and_steps(server):
    time.sleep(1.2)  # what was asked before is counted, the canary's token among it
    before = [
        metric(server, f"gdn2_{name}_total", "gdn2_generate") for name in ("tokens_read", "tokens_written", "steps")
    ]
    list(Client(server.http).generate(b"x" * 11, 50))
    time.sleep(1.2)
    after = [
        metric(server, f"gdn2_{name}_total", "gdn2_generate") for name in ("tokens_read", "tokens_written", "steps")
    ]
    assert [y - x for x, y in zip(before, after)] == [11, 50, 49]
    assert metric(server, "gdn2_step_seconds_total", "gdn2_generate") > 0
    generation = Client(server.http).generate(b"x" * 11, 4000)
    next(generation)
    assert becomes(lambda: 1e-3 < metric(server, "gdn2_state_norm", "gdn2_generate") < 1e6, True)
    generation.close()
    assert metric(server, "gdn2_not_finite_total", "gdn2_generate") == 0


def test_the_client_of_the_command_line(server, capfdbinary):
    for address in (["--http", server.http], ["--http", "127.0.0.1:1", "--grpc", server.grpc]):
        assert cli.main(["client", "--prompt", "import ", "--count", "30", *address]) == 0
        assert capfdbinary.readouterr().out == eager(b"import ", 30) + b"\n"
    assert cli.main(["client", "--canary", "--http", server.http]) == 0
    assert cli.main(["client", "--canary", "--http", "127.0.0.1:1"]) == 1
    assert b"refused" in capfdbinary.readouterr().err
