"""What a run of gpu-bench says: tables, targets, JSON with every sample, and a plot."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from benchmarks.gpu.measure import MODES, Row, Table
from benchmarks.gpu.peers import OURS
from benchmarks.gpu.plan import TARGETS, Problem, Target
from benchmarks.report import Spread

COLUMNS = ("contender", "error", *MODES, "p20 .. p80, cold", "times ours", "x floor", "of the copy", "memory")
COLD = MODES[0]


def text(table: Table) -> str:
    """Markdown: a table for each problem. The floor is the compulsory bytes at the rate of a copy in the same run."""
    parts = []
    for problem in dict.fromkeys(row.problem for row in table.rows):
        lines = [_line(table, row) for row in table.rows if row.problem == problem]
        limit = floor(table, problem)
        title = f"**{problem}**" + (f", floor {_time(limit)}" if limit else "")
        notes = [f"{row.contender}: {note}" for row in table.rows if row.problem == problem for note in row.notes]
        parts += [title, _markdown(COLUMNS, lines), *notes]
    return "\n\n".join(parts)


def targets(table: Table) -> str:
    """Markdown: every target, what was measured, and whether it is met."""
    lines = []
    for target in TARGETS:
        got = measured(table, target)
        bounds = " / ".join("-" if bound is None else f"{bound:g}" for bound in (target.must, target.stretch))
        sign = ">=" if target.at_least else "<="
        number = "-" if got is None else f"{got:.3g}"
        lines.append((str(target.problem), target.metric, f"{sign} {bounds}", number, target.verdict(got)))
    return _markdown(("problem", "metric", "must / stretch", "measured", ""), lines)


def measured(table: Table, target: Target) -> float | None:
    """The number of a target; None where a side of it was not timed or was wrong."""
    ours = _seconds(table, target.problem, OURS, MODES[2] if target.metric == "us, graph" else COLD)
    if ours is None:
        return None
    if target.metric == "ms":
        return 1e3 * ours
    if target.metric == "us, graph":
        return 1e6 * ours
    if target.metric == "of the copy":
        limit = floor(table, str(target.problem))
        return limit / ours if limit else None
    others = {row.contender for row in table.rows if row.contender != OURS and "bare" not in row.contender}
    times = [_seconds(table, target.problem, other, COLD) for other in others]
    right = [seconds for seconds in times if seconds is not None]
    return min(right) / ours if right else None


def floor(table: Table, problem: str) -> float | None:
    """Seconds."""
    rate = table.copy_rates.get(problem)
    return table.bytes[problem] / rate if rate else None


def _seconds(table: Table, problem: Problem, contender: str, mode: str) -> float | None:
    for row in table.rows:
        if (row.problem, row.contender, row.status) == (str(problem), contender, "ok") and row.seconds.get(mode):
            return statistics.median(row.seconds[mode])
    return None


def _line(table: Table, row: Row) -> tuple[str, ...]:
    if not row.seconds:
        return (row.contender, row.status, *["-"] * (len(COLUMNS) - 2))
    medians = {mode: statistics.median(samples) for mode, samples in row.seconds.items()}
    cold = Spread.of(row.seconds[COLD])
    ours = next((one for one in table.rows if (one.problem, one.contender) == (row.problem, OURS)), row)
    of_ours = f"{cold.median / statistics.median(ours.seconds[COLD]):.2f}" if ours.seconds else "-"
    limit = floor(table, row.problem)
    return (
        row.contender,
        ("WRONG " if row.status == "wrong" else "") + ("-" if row.error is None else f"{row.error:.1e}"),
        *(_time(medians[mode]) if mode in medians else "-" for mode in MODES),
        f"{_time(cold.p20)} .. {_time(cold.p80)}",
        of_ours,
        f"{cold.median / limit:.2f}" if limit else "-",
        f"{100 * limit / cold.median:.0f} %" if limit else "-",
        "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f} MiB",
    )


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} us" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"


def _markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = (head, tuple("---" for _ in head), *rows)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_json(table: Table, about: dict[str, object], path: Path) -> None:
    """Everything, in one line for each list of samples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about | table.as_json()) + "\n")


def plot(table: Table, about: str, path: Path) -> None:
    """Times over the floor, cold and eager: one group of bars for each problem."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in table.rows if row.seconds and floor(table, row.problem)]
    problems = list(dict.fromkeys(row.problem for row in rows))
    figure, axis = plt.subplots(figsize=(11, 1 + 0.55 * len(problems)))
    names = list(dict.fromkeys(row.contender for row in rows))
    for i, problem in enumerate(problems):
        here = [row for row in rows if row.problem == problem]
        for j, row in enumerate(here):
            times = statistics.median(row.seconds[COLD]) / (floor(table, problem) or 1)
            colour = f"C{names.index(row.contender)}"
            label = row.contender + (" (wrong)" if row.status == "wrong" else "")
            axis.barh(-i - 0.8 * j / len(here), times, 0.75 / len(here), color=colour, label=label)
    axis.set_yticks([-i - 0.3 for i in range(len(problems))], problems, fontsize=7)
    axis.set_xscale("log")
    axis.set_xlabel("time over the floor, cold and eager (1 is a copy of the compulsory bytes)", fontsize=8)
    labels = dict(zip(*reversed(axis.get_legend_handles_labels())))
    if labels:
        axis.legend(labels.values(), labels.keys(), fontsize=7)
    axis.set_title(about, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
