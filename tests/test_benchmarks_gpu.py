"""The host side of gpu-bench: plan, errors, tables, JSON and plot, with a device whose clock is made up.

Nothing here is a measurement: `FakeDevice` returns the seconds it was told to. The operators run on CPU tensors.
"""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks.gpu import __main__ as bench
from benchmarks.gpu import peers, report
from benchmarks.gpu.measure import MODES, Row, Settings, Table, measure
from benchmarks.gpu.plan import OPS, PROBLEMS, TARGETS, Problem, Target, inputs

TOY = (
    Problem("chunk", 1, 40, 3, K=16, V=8),
    Problem("chunk", 1, 30, 3, K=16, V=8, gates="strong", packed=(7, 0, 23)),
    Problem("train", 2, 20, 3, K=8, V=16),
    Problem("step", 3, 1, 3, K=16, V=8, gates="weak"),
    Problem("step", 3, 1, 3, K=16, V=8, state="bf16"),
    Problem("step_layer", 2, 1, 2, K=32, V=32),
)


class FakeDevice:
    """A clock that advances by `tick` with every sample; a replay that is the call."""

    def __init__(self):
        self.device = torch.device("cpu")
        self.about = {"gpu": "no GPU: made-up clock"}
        self.samples = 0

    def seconds(self, call, *, cold, calls=1):
        call()
        self.samples += 1
        return 2e-3 if cold else 1e-3

    def captured(self, call):
        if self.samples < 0:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return call

    def copy_rate(self):
        return 1e9

    def peak_bytes(self, call):
        return 1 << 20


class Float32(peers.Ours):
    """Our operators in the float32 that Triton's interpreter has right."""

    name = "in float32"
    ops = ("step", "step_layer")

    def prepare(self, problem, x):
        single = peers.Inputs(*(y.float() for y in x.six), x.state.float(), x.cu_seqlens)
        if problem.op == "step_layer":
            return peers.FusedLayer().prepare(problem, single)
        from gdn2_ops.kernels import step

        def call():
            o = step.step_inplace(*single.six, single.state, None, problem.K**-0.5)
            x.state.copy_(single.state)
            return (o,)

        return call


class OnCpu(peers.Ours):
    ops = ("chunk", "train")


class Eager(peers.CompiledLayer):
    backend = "eager"  # the compiler's code takes a minute to make


class Wrong(OnCpu):
    name, ops = "wrong", ("chunk", "step")

    def prepare(self, problem, x):
        return lambda: tuple(1.5 * y for y in (x.v, x.state)[: 1 if problem.op == "step" else 2])


class Failing(Wrong):
    name = "failing"

    def prepare(self, problem, x):
        raise ValueError("no such tile\nmore")


class Absent(Wrong):
    name = "absent"

    @staticmethod
    def missing():
        return "not installed: make it"


CONTENDERS = (OnCpu, Float32, peers.BareStep, Wrong, Failing, Absent)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu")
    table = bench.run(out, FakeDevice(), Settings(rounds=2, warm_calls=1), TOY, CONTENDERS, notes=["a note"])
    (file,) = out.glob("*.json")
    (image,) = out.glob("*.png")
    (document,) = out.glob("*.md")
    assert image.read_bytes().startswith(b"\x89PNG")
    return table, json.loads(file.read_text()), document.read_text()


def row(table, problem, contender):
    return next(one for one in table.rows if (one.problem, one.contender) == (str(problem), contender))


def test_every_contender_has_a_row_for_every_problem_of_its_kind(results):
    table, file, _ = results
    wanted = [(str(p), c.name) for p in TOY for c in CONTENDERS if p.op in c.ops]
    assert [(one.problem, one.contender) for one in table.rows] == wanted
    assert [(one["problem"], one["contender"]) for one in file["rows"]] == wanted
    assert file["device"] == FakeDevice().about and file["notes"] == ["a note"]
    assert set(file["versions"]) == {"python", "torch", "triton", "fla-core"}


def test_right_ones_are_right_and_wrong_ones_wrong(results):
    table = results[0]
    for problem in TOY:
        ours = [
            one for one in table.rows if one.problem == str(problem) and one.contender in ("gdn2_ops", "in float32")
        ]
        assert [(one.status, one.error is not None and one.error < 1e-2) for one in ours] == [("ok", True)]
    assert row(table, TOY[0], "wrong").status == "wrong" and row(table, TOY[0], "wrong").error > 0.1
    assert row(table, TOY[3], "failing").status == "failed: ValueError: no such tile"
    assert row(table, TOY[3], "absent").status == "not installed: make it"


def test_every_mode_has_a_sample_for_every_round(results):
    table = results[0]
    assert set(row(table, TOY[0], "gdn2_ops").seconds) == set(MODES)
    assert set(row(table, TOY[2], "gdn2_ops").seconds) == set(MODES[:2])  # no graph of a training step
    assert all(len(samples) == 2 for one in table.rows for samples in one.seconds.values())


def test_the_tables(results):
    _, _, document = results
    assert "no GPU: made-up clock" in document and "| gdn2_ops |" in document and "| WRONG " in document
    assert "| absent | not installed: make it |" in document and "not measured" in document


def test_the_compiled_layer_is_the_fused_one():
    problem = TOY[-1]
    x = inputs(problem, torch.device("cpu"), dtype=torch.float32)
    one, other = (peers.Inputs(*x.six, x.state.clone(), None) for _ in range(2))
    fused = peers.FusedLayer().prepare(problem, one)
    unfused = Eager().prepare(problem, other)
    for _ in range(2):  # the window moves on
        torch.testing.assert_close(fused()[0], unfused()[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.state, other.state, rtol=1e-4, atol=1e-5)


def test_a_call_that_no_graph_captures_has_eager_times_only():
    device = FakeDevice()
    device.samples = -100
    table = measure(TOY[:1], (OnCpu,), device, Settings(rounds=1))
    assert set(table.rows[0].seconds) == set(MODES[:2])
    assert table.rows[0].notes == ["no CUDA graph: operation not permitted when stream is capturing"]
    assert report.text(table).endswith("\n\ngdn2_ops: no CUDA graph: operation not permitted when stream is capturing")


def test_a_run_stops_in_time_and_keeps_what_it_has():
    saved = []
    now = iter(range(0, 10_000, 20))  # every look at the clock is 20 s later

    def save(table):
        saved.append(len(table.rows))

    table = measure(TOY[:1] * 9, (OnCpu,), FakeDevice(), Settings(rounds=1, minutes=2), save, lambda: next(now))
    states = [one.status for one in table.rows]
    assert saved and states[: len(saved)] == ["ok"] * len(saved)
    assert states[len(saved) :] == ["not run: out of time"] * (9 - len(saved)) and len(saved) < 9


def table_of(problem, **seconds):
    rows = [Row(str(problem), name, "ok", 1e-3, 0, {mode: [s] for mode in MODES}) for name, s in seconds.items()]
    return Table(rows, {str(problem): problem.compulsory_bytes}, {str(problem): 4e12})


def test_targets_read_the_times_they_are_about():
    problem = Problem("chunk", 1, 8192, 96)
    table = table_of(problem, gdn2_ops=1e-3, fla=3e-3, slower=9e-3)
    assert report.measured(table, Target(problem, "speed-up", 2.5, None)) == pytest.approx(3.0)
    assert report.measured(table, Target(problem, "ms", 1.3, 0.85)) == pytest.approx(1.0)
    assert report.measured(table, Target(problem, "us, graph", 1.3, 0.85)) == pytest.approx(1000)
    share = problem.compulsory_bytes / 4e12 / 1e-3
    assert report.measured(table, Target(problem, "of the copy", 0.8, 0.9)) == pytest.approx(share)
    table.rows[1].status = "wrong"
    assert report.measured(table, Target(problem, "speed-up", 2.5, None)) == pytest.approx(9.0)
    table.rows[0].status = "wrong"
    assert report.measured(table, Target(problem, "ms", 1.3, 0.85)) is None


@pytest.mark.parametrize(
    "metric, measured, verdict",
    [
        ("ms", 0.8, "stretch met"),
        ("ms", 1.2, "must met"),
        ("ms", 1.4, "missed"),
        ("speed-up", 1.4, "stretch met"),
        ("speed-up", 0.9, "must met"),
        ("speed-up", 0.8, "missed"),
        ("ms", None, "not measured"),
    ],
)
def test_verdicts(metric, measured, verdict):
    bounds = (1.3, 0.85) if metric == "ms" else (0.85, 1.3)
    assert Target(PROBLEMS[0], metric, *bounds).verdict(measured) == verdict


def test_the_plan():
    assert len(set(PROBLEMS)) == len(PROBLEMS) and len({str(problem) for problem in PROBLEMS}) == len(PROBLEMS)
    assert {problem.op for problem in PROBLEMS} == set(OPS)
    assert {problem.gates for problem in PROBLEMS} == {"weak", "trained", "strong"}
    assert {target.problem for target in TARGETS} <= set(PROBLEMS)
    assert all(sum(problem.packed) == problem.T and problem.B == 1 for problem in PROBLEMS if problem.packed)
    state = 2 * 4 * 128 * 128
    assert Problem("chunk", 1, 8192, 96).compulsory_bytes == 96 * (8192 * 2048 + state)
    assert Problem("step", 64, 1, 32).compulsory_bytes == 64 * 32 * (state + 2048)


def test_without_matplotlib_everything_but_the_plot_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    bench.run(tmp_path, FakeDevice(), Settings(rounds=2, warm_calls=1), TOY[:1], (OnCpu,))
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".json", ".md"]
    said = capsys.readouterr()
    assert "**Targets**" in said.out and "is not drawn" in said.err and "pip install matplotlib" in said.err


def test_compiling_ahead_has_one_deadline_for_all(monkeypatch):
    seconds = [0.0]

    class Endless:
        returncode = -9

        def __init__(self, *_, **__):
            self.killed = False

        def communicate(self, timeout=None):
            if self.killed:
                return "", ""
            seconds[0] += timeout
            raise subprocess.TimeoutExpired("job", timeout)

        def kill(self):
            self.killed = True

    monkeypatch.setattr(peers.fla_peer, "missing", lambda: None)
    monkeypatch.setattr(peers.subprocess, "Popen", Endless)
    monkeypatch.setattr(peers.time, "monotonic", lambda: seconds[0])
    failed = peers.compile_ahead(PROBLEMS, deadline_s=100)
    assert len(failed) > 3 and 100 <= seconds[0] <= 100 + len(failed)


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is an NVIDIA GPU here")
    command = [sys.executable, "-m", "benchmarks.gpu", "-o", "/nonexistent"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "expected an NVIDIA GPU, got none" in done.stderr
