"""What a run says: the table, the targets, JSON with every sample, and a plot."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import onnx_file
from benchmarks.measure import Row, Table
from benchmarks.problems import PROBLEMS

OURS, CORE, FORWARD = "gdn2_ops", "gdn2_ops, C++ core", "gdn2_ops, its forward"
ORT_IN_PLACE = "ONNX Runtime, state in place"
NODE, BODY = "gdn2_ops in ONNX Runtime", "gdn2_ops, body in ONNX Runtime"
ORT, GGML, NAIVE = "ONNX Runtime LinearAttention", "ggml gated_delta_net", "naive PyTorch loop"
TOKEN, STEP, POOL, PROMPT, PREFILL, BACKWARD = (str(PROBLEMS[i]) for i in (0, 1, 2, 4, 5, 7))
FILES = [onnx_file.name(T) for T in onnx_file.TOKENS]
COLUMNS = ("peer", "gates", "error", "time", "p20 .. p80", "times ours", "p20 .. p80", "of the floor")


@dataclass(frozen=True)
class Spread:
    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, samples: list[float]) -> Spread:
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        fifths = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(statistics.median(samples), fifths[0], fifths[3])


def ratio(over: list[float], under: list[float]) -> Spread | None:
    """Of samples taken in the same rounds; None where one of them was not taken."""
    return Spread.of([a / b for a, b in zip(over, under)]) if over and under else None


def floor(table: Table, problem: str) -> tuple[str, list[float]] | None:
    """The higher floor of a problem, by name, and its samples."""
    floors = table.floors.get(problem)
    return max(floors.items(), key=lambda item: statistics.median(item[1])) if floors else None


def share(table: Table, problem: str, peer: str) -> Spread | None:
    """Time of the floor over time of the peer, round by round."""
    lowest = floor(table, problem)
    return ratio(lowest[1], table.row(problem, peer).seconds) if lowest else None


def _against(problem: str, peer: str, mine: str = OURS) -> Callable[[Table], Spread | None]:
    def measured(table: Table) -> Spread | None:
        row, ours = table.row(problem, peer), table.row(problem, mine)
        return ratio(row.seconds, ours.seconds) if row.status == ours.status == "ok" else None

    return measured


def _error(problem: str, peer: str) -> Callable[[Table], Spread | None]:
    def measured(table: Table) -> Spread | None:
        found = table.row(problem, peer).error
        return None if found is None else Spread(found, found, found)

    return measured


TARGETS: tuple[tuple[str, float, bool, Callable[[Table], Spread | None]], ...] = (
    # text, bound, whether it is a lower bound, the number
    (f"{STEP}: {ORT} / ours", 3, True, _against(STEP, ORT)),
    (f"{STEP}: {ORT_IN_PLACE} / ours", 3, True, _against(STEP, ORT_IN_PLACE)),
    (f"{STEP}: {GGML} / ours", 4, True, _against(STEP, GGML)),
    (f"{STEP}: {ORT} / our C++ core", 3, True, _against(STEP, ORT, CORE)),
    (f"{STEP}: {GGML} / our C++ core", 4, True, _against(STEP, GGML, CORE)),
    (f"{STEP}: share of the floor", 0.75, True, lambda table: share(table, STEP, OURS)),
    (f"{STEP}: share of the floor, our C++ core", 0.75, True, lambda table: share(table, STEP, CORE)),
    (f"{POOL}: share of the floor", 0.85, True, lambda table: share(table, POOL, OURS)),
    (f"{TOKEN}: {BODY} / with its kernels", 2, True, _against(TOKEN, BODY, NODE)),
    (f"{PROMPT}: {BODY} / with its kernels", 2, True, _against(PROMPT, BODY, NODE)),
    *((f"{file}: {BODY} / with its kernels", 2.0, True, _against(file, BODY, NODE)) for file in FILES),
    *((f"{file}: kernels differ from the body by", 2e-6, False, _error(file, NODE)) for file in FILES),
    (f"{PREFILL}: {ORT} / ours", 2, True, _against(PREFILL, ORT)),
    (f"{PREFILL}: {NAIVE} / ours", 15, True, _against(PREFILL, NAIVE)),
    (f"{BACKWARD}: ours / its forward", 4, False, _against(BACKWARD, OURS, FORWARD)),
    (f"{BACKWARD}: our C++ core / our forward", 4, False, _against(BACKWARD, CORE, FORWARD)),
)


def text(table: Table) -> str:
    """Markdown: one table for each problem, its floors in the title."""
    parts = []
    for problem in dict.fromkeys(row.problem for row in table.rows):
        floors = ", ".join(f"{k} {_time(Spread.of(v).median)}" for k, v in table.floors[problem].items())
        lines = [_line(table, row) for row in table.rows if row.problem == problem]
        parts.append(_markdown(f"**{problem}**" + (f", floors: {floors}" if floors else ""), COLUMNS, lines))
    return "\n\n".join(parts)


def targets(table: Table) -> str:
    """Markdown: each target of the whole benchmark, what was measured, met or missed."""
    lines = []
    for what, bound, at_least, number in TARGETS:
        got = number(table)
        met = got is not None and (got.median >= bound if at_least else got.median <= bound)
        verdict = "not measured" if got is None else "met" if met else "missed"
        lines.append((what, f"{'>=' if at_least else '<='} {bound:g}", "-" if got is None else _number(got), verdict))
    return _markdown("**Targets**", ("what", "target", "median (p20 .. p80)", ""), lines)


def _line(table: Table, row: Row) -> tuple[str, ...]:
    wrong = "" if row.status != "wrong" else "WRONG "
    if not row.seconds:
        return (row.peer, row.gates, row.status, *["-"] * 5)
    ours = next(r for r in table.rows if r.problem == row.problem)  # the first of a problem
    spread, of_ours = Spread.of(row.seconds), ratio(row.seconds, ours.seconds)
    of_floor = share(table, row.problem, row.peer)
    return (
        row.peer,
        row.gates,
        f"{wrong}{row.error:.0e}",
        _time(spread.median),
        f"{_time(spread.p20)} .. {_time(spread.p80)}",
        "-" if wrong or of_ours is None else f"{of_ours.median:.2f}",
        "-" if wrong or of_ours is None else f"{of_ours.p20:.2f} .. {of_ours.p80:.2f}",
        "-" if wrong or of_floor is None else f"{100 * of_floor.median:.0f} %",
    )


def _number(x: Spread) -> str:
    return f"{x.median:.3g} ({x.p20:.3g} .. {x.p80:.3g})"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} us" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"


def _markdown(title: str, head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
    rows = (head, tuple("-" * w for w in widths), *lines)
    return "\n".join([title, "", *("| " + " | ".join(c.ljust(w) for c, w in zip(r, widths)) + " |" for r in rows)])


def machine() -> dict[str, object]:
    """Processor, number of cores, load. No name of the machine."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return {
        "cpu": fields.get("model name", platform.processor()),
        "family, model, stepping": [fields.get(k) for k in ("cpu family", "model", "stepping")],
        "cores": os.cpu_count(),
        "system": platform.system(),
        "load before": os.getloadavg(),
    }


def write_json(table: Table, about: dict[str, object], path: Path) -> None:
    """about: date, command, machine, versions, settings."""
    rows = [asdict(row) | ({"spread": asdict(Spread.of(row.seconds))} if row.seconds else {}) for row in table.rows]
    path.write_text(
        json.dumps(about | {"disturbed": table.disturbed, "floors": table.floors, "rows": rows}, indent=1) + "\n"
    )


def plot(table: Table, about: str, path: Path) -> None:
    """One panel for each problem: median and p20 to p80 of each peer, the floor as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    problems = list(dict.fromkeys(row.problem for row in table.rows))
    figure, axes = plt.subplots(-(-len(problems) // 2), 2, figsize=(13, 2.1 * -(-len(problems) // 2)), squeeze=False)
    for axis in axes.flat[len(problems) :]:
        axis.remove()
    for axis, problem in zip(axes.flat, problems):
        rows = [row for row in table.rows if row.problem == problem and row.seconds][::-1]
        spreads = [Spread.of([1e3 * s for s in row.seconds]) for row in rows]
        for i, (row, spread) in enumerate(zip(rows, spreads)):
            reach = [[spread.median - spread.p20], [spread.p80 - spread.median]]
            colour = "tab:red" if row.status == "wrong" else "tab:blue" if OURS in row.peer else "dimgray"
            axis.errorbar(spread.median, i, xerr=reach, fmt="o", color=colour, markersize=5, capsize=2)
        axis.set_yticks(range(len(rows)), [row.peer for row in rows])
        axis.grid(axis="x", which="both", linewidth=0.3)
        lowest = floor(table, problem)
        if lowest:
            axis.axvline(1e3 * statistics.median(lowest[1]), color="black", linestyle=":", linewidth=1.2)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_title(problem + (f"  (dotted: {lowest[0]} floor)" if lowest else ""), fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.set_xlabel("ms", fontsize=8)
    figure.suptitle(about, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
