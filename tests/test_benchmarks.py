"""The benchmark at toy sizes: every row is there, a wrong peer is called wrong, and a missing one says so."""

import json
from dataclasses import asdict

import pytest
import torch

from benchmarks import cpu, floors, onnx_file, report
from benchmarks.ggml_peer import Ggml
from benchmarks.measure import Row, Settings, Table
from benchmarks.onnxruntime_peer import LibraryInOnnxRuntime, OnnxRuntime
from benchmarks.peers import CompiledReference, Library, NaiveLoop
from benchmarks.problems import PROBLEMS, Coordinates, Problem, answer, error, inputs

TOY = (
    Problem("step", 2, 1, 2, K=16, V=16),
    Problem("chunk", 1, 70, 2, K=16, V=16),
    Problem("backward", 1, 70, 2, K=16, V=16),
)
FAST = Settings(rounds=2, block_s=0.001, settle_s=0.0, patience_s=0.0)


class EagerReference(CompiledReference):
    backend = "eager"  # the compiler's code takes a minute to make


class WrongLoop(NaiveLoop):
    name = "wrong loop"
    ops = ("step", "chunk", "backward")

    def forward(self, q, k, v, g, b, w, state):
        return super().forward(q, k, v, g, b.roll(1, -1), w, state)


class Absent(NaiveLoop):
    name = "absent"
    ops = ("step", "chunk", "backward")

    @staticmethod
    def missing():
        return "not installed: pip install absent"


PEERS = (*(EagerReference if p is CompiledReference else p for p in cpu.PEERS), WrongLoop, Absent)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    table = cpu.run(out, threads=1, settings=FAST, problems=TOY, peers=PEERS, files=(3,))
    (file,) = out.glob("*.json")
    (image,) = out.glob("*.png")
    assert image.read_bytes().startswith(b"\x89PNG")
    return table, json.loads(file.read_text())


def test_every_row_is_in_the_table_and_in_the_file(results):
    table, file = results
    wanted = [(str(p), peer.name) for p in TOY for peer in PEERS if p.op in peer.ops]
    wanted += [(onnx_file.name(3), peer.name) for peer in onnx_file.PEERS]
    assert [(row.problem, row.peer) for row in table.rows] == wanted
    assert [(row["problem"], row["peer"]) for row in file["rows"]] == wanted
    lines = report.text(table).splitlines()
    assert [line.split("|")[1].strip() for line in lines if "GDN-2" in line] == [peer for _, peer in wanted]
    assert file["versions"]["torch"] == torch.__version__ and file["threads"] == 1 and file["machine"]["cores"] > 0


def test_every_peer_that_is_there_is_right(results):
    for row in results[0].rows:
        if row.peer not in (WrongLoop.name, Absent.name) and not row.status.startswith("not installed"):
            assert (row.status, len(row.seconds)) == ("ok", FAST.rounds), asdict(row)
            assert row.error < 1e-5


def test_a_file_without_the_kernels_is_called_wrong(monkeypatch):
    """The file runs without them, by its body: nothing but the numbers tells."""
    monkeypatch.setattr(onnx_file, "LibraryInOnnxRuntime", None)  # what registers the library
    table = Table()
    onnx_file.measure_file(table, (2,), 1, FAST)
    assert [row.status for row in table.rows] == ["wrong", "ok"]
    monkeypatch.undo()
    monkeypatch.setattr(LibraryInOnnxRuntime, "missing", staticmethod(lambda: "not built"))
    onnx_file.measure_file(table, (3,), 1, FAST)
    assert [(row.status, len(row.seconds)) for row in table.rows[2:]] == [("not built", 0), ("ok", FAST.rounds)]


def test_a_wrong_peer_is_called_wrong(results):
    rows = [row for row in results[0].rows if row.peer == WrongLoop.name]
    assert [row.status for row in rows] == ["wrong"] * len(TOY)
    lines = [line for line in report.text(results[0]).splitlines() if WrongLoop.name in line]
    assert len(lines) == len(TOY)
    for line in lines:
        _, _, _, wrong, *_, times_ours, _, of_the_floor, _ = (x.strip() for x in line.split("|"))
        assert wrong.startswith("WRONG") and times_ours == of_the_floor == "-"


def test_a_missing_peer_says_so_and_the_run_goes_on(results):
    rows = [row for row in results[0].rows if row.peer == Absent.name]
    assert [(row.status, row.seconds) for row in rows] == [("not installed: pip install absent", [])] * len(TOY)
    assert report.text(results[0]).count("not installed: pip install absent") == len(TOY)


def test_a_floor_is_below_the_library(results):
    table, _ = results
    for problem in TOY[:2]:
        assert 0 < report.share(table, str(problem), Library.name).median < 1
    assert table.floors[str(TOY[2])] == {}


def test_the_floor_probes_scale_with_the_work():
    library = floors.build()
    small, large = (floors.Floors(Problem("step", 1, 1, H), 1, library) for H in (1, 64))
    fma, scale = (
        [min(f() for _ in range(5)) for f in pair] for pair in ((small.fma, large.fma), (small.scale, large.scale))
    )
    assert 16 * fma[0] < fma[1] < 256 * fma[0]
    assert scale[1] > 16 * scale[0] > 0
    assert large.buffer.eq(1).all()


def test_coordinates_are_exact():
    problem = Problem("chunk", 2, 33, 3, K=8, V=6)
    x = inputs(problem)
    for name in ("q", "k", "v", "g", "b", "w", "state"):
        setattr(x, name, getattr(x, name).double())
    c = Coordinates.of(x)
    ones_K, ones_V = torch.ones_like(c.k), torch.ones_like(c.v)
    o, final = NaiveLoop(problem, x, 1).forward(c.q, c.k, c.v, c.g, ones_K, ones_V, x.state)
    assert error((o, c.state(final)), answer(problem, x)) < 1e-13


def test_targets_are_met_missed_or_not_measured():
    table = Table([Row(str(p), peer.name, "", "ok", 0.0, [1.0, 1.0]) for p in PROBLEMS for peer in cpu.PEERS])
    files = [(onnx_file.name(T), peer.name) for T in onnx_file.TOKENS for peer in onnx_file.PEERS]
    table.rows += [Row(*row, "", "ok", 0.0, [1.0, 1.0]) for row in files]
    table.floors = {str(p): {"fma": [0.8, 0.8]} for p in PROBLEMS}
    verdicts = [line.split("|")[-2].strip() for line in report.targets(table).splitlines()[4:]]
    assert verdicts == [*["missed"] * 5, "met", "met", *["missed"] * 5, "met", "met", "missed", "missed", "met", "met"]
    table.row(PROBLEMS[1], OnnxRuntime.name).status = "wrong"
    table.row(PROBLEMS[1], Ggml.name).seconds = []
    verdicts = [line.split("|")[-2].strip() for line in report.targets(table).splitlines()[4:]]
    assert verdicts[:5] == ["not measured", "missed", "not measured", "not measured", "not measured"]
