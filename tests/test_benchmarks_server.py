"""What the benchmark of the server says of arrivals that are known."""

import pytest

from benchmarks import server, soak


def test_summary_of_two_streams():
    # One token at 0.5 s, then one each 0.1 s; and a stream whose tokens come two at a time.
    single = [(0.5 + 0.1 * i, 1 + i) for i in range(11)]
    pairs = [(0.7 + 0.2 * i, 1 + 2 * i) for i in range(6)]
    row = server.summary([[single, pairs]])
    assert row["first_ms"] == pytest.approx(600) and row["tokens_per_s"] == pytest.approx(22 / 1.7)
    assert row["ms_per_token"] == pytest.approx(100) and row["gap_p50_ms"] == pytest.approx(100)
    assert row["gap_p99_ms"] == pytest.approx(200)
    line = server.table([{"what": "served", "sequences": 2, "prompt": 16, **row}]).splitlines()[-1]
    assert line == "| 16 | 2 | served | 600 | 12.94 | 100 | 100 | 200 |"


def test_prompts_differ_and_have_their_length():
    texts = server.prompts(64, 1024)
    assert len(set(texts)) == 64 and {len(text) for text in texts} == {1024}


class Traffic:
    def __init__(self, tokens_per_tenth, errors=()):
        self.rate, self.errors, self.calls = tokens_per_tenth, list(errors), 0

    @property
    def tokens(self):
        self.calls += 1
        return sum(self.rate[: self.calls])

    def start(self):
        pass

    join = start


@pytest.mark.parametrize(
    "rates, errors, memory, text",
    [
        ([100] * 9 + [95], [], [1000] * 10, "no failure"),
        ([100] * 9 + [80], [], [1000] * 10, "speed fell"),
        ([100] * 10, [], [*range(1000, 1010)], "no failure"),
        ([100] * 10, [], [1000] * 9 + [1030], "memory grew"),
        ([100] * 10, ["wrote b'x'"], [1000] * 10, "wrote b'x'"),
    ],
)
def test_a_soak_fails_for_what_it_says(rates, errors, memory, text, monkeypatch, capsys):
    monkeypatch.setattr(soak, "CLIENTS", 1)
    monkeypatch.setattr(soak, "Traffic", lambda *_: Traffic(rates, errors))
    left = iter(memory)
    monkeypatch.setattr(soak, "resident_bytes", lambda _: next(left))
    process = type("Process", (), {"pid": 1})
    server_like = type("Server", (), {"process": process})
    assert soak._run(server_like, [], 0.01) == int(text != "no failure")
    assert text in capsys.readouterr().out
