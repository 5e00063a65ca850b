"""What the study says: the tables and verdicts of docs/recall.md, from benchmarks/results/recall.json, and pictures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from examples.recall import study
from examples.recall.variants import VARIANTS

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the backend is chosen

ROOT = Path(__file__).resolve().parent.parent.parent
RESULT = ROOT / "benchmarks" / "results" / "recall.json"
DOCUMENT = ROOT / "docs" / "recall.md"
MARKER = "<!-- from here on written by make recall -->\n"
ORDERINGS = (  # of the paper, the better one last
    ("linear attention", "Mamba-2"),
    ("Mamba-2", "Gated DeltaNet"),
    ("Gated DeltaNet", "KDA"),
    ("KDA", "GDN-2"),
    ("Mamba-3", "GDN-2"),
    ("GDN-2, write only", "GDN-2, erase only"),
    ("GDN-2, write only", "GDN-2"),
    ("GDN-2, erase only", "GDN-2"),
)
Report = dict[str, Any]


def write(report: Report) -> None:
    """The part of the document behind its marker, and the pictures beside it."""
    DOCUMENT.write_text(behind_marker(DOCUMENT.read_text(), text(report)))
    draw(report, DOCUMENT.parent)


def behind_marker(document: str, new: str) -> str:
    """The document with what stands behind its marker replaced."""
    head, marker, _ = document.partition(MARKER)
    if not marker:
        raise ValueError(f"{DOCUMENT}: expected a line {MARKER.strip()!r}, got none")
    return f"{head}{marker}\n{new}\n"


def ordered(records: Sequence[study.Record]) -> list[study.Record]:
    """By task, variant, seed and rate, in the order of the study."""
    tasks, variants = list(study.TASKS), list(VARIANTS)
    return sorted(records, key=lambda r: (tasks.index(r["task"]), variants.index(r["variant"]), r["seed"], r["rate"]))


def missing(records: Sequence[study.Record]) -> list[study.Run]:
    """The runs that a report needs and the records do not have."""
    done = {study.key(r) for r in records}
    left = [run for task in study.TASKS for run in study.selection_runs(task) if run not in done]
    return left or [run for task in study.TASKS for run in study.reported_runs(task, records) if run not in done]


def reported(report: Report, task: str, variant: str) -> list[study.Record]:
    """The records of the reported seeds."""
    runs = [r for r in report["runs"] if (r["task"], r["variant"]) == (task, variant)]
    return [r for r in runs if r["seed"] in study.SEEDS]


def scores(report: Report, task: str, variant: str, what: str) -> list[float]:
    """In percent, one of each reported seed; `what` is a question, or "all": their mean."""
    found = [r["scores"] for r in reported(report, task, variant)]
    return [100 * (statistics.fmean(s.values()) if what == "all" else s[what]) for s in found]


def text(report: Report) -> str:
    """Markdown of everything in a report."""
    runs, machine = report["runs"], report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    cpu, wall = (sum(r[name] for r in runs) for name in ("cpu_s", "wall_s"))
    parts = [
        f"`{report['command']}`, {report['date']}, {machine['processor']}, {machine['cores']} cores, {versions}; "
        f"{len(runs)} trainings of one thread each: {cpu:,.0f} s of processor time, or {cpu / 120:.0f} minutes of two "
        f"processors. A training had a processor for {cpu / wall:.0%} of its time; the rest was other programs'."
    ]
    for task in study.TASKS:
        parts += [f"### {task}", f"![{task}](recall-{task}.png)", table(report, task)]
    return "\n\n".join((*parts, "### Orderings", orderings(report)))


def table(report: Report, task: str) -> str:
    """Mean and standard deviation over the seeds, in percent."""
    whats = list(study.TASKS[task].ask)
    lines = [("rule", "parameters", "state", "rate", "CPU s", *whats, "mean")]
    for variant in VARIANTS:
        runs = reported(report, task, variant)
        sizes = (f"{runs[0]['parameters']:,}", f"{runs[0]['state']:,}", f"{runs[0]['rate']:g}")
        seconds = f"{statistics.fmean(r['cpu_s'] for r in runs):.0f}"
        cells = (spread(scores(report, task, variant, what)) for what in (*whats, "all"))
        lines.append((variant, *sizes, seconds, *cells))
    return _table(lines)


def orderings(report: Report) -> str:
    """One line for each ordering of the paper: the differences of the means of all questions, seed by seed."""
    lines = [("ordering", *(f"{task}: difference, points | {task}" for task in study.TASKS))]
    for lower, higher in ORDERINGS:
        cells = []
        for task in study.TASKS:
            of_seeds = differences(report, task, lower, higher)
            cells.append(f"{spread(of_seeds)} | {verdict(of_seeds)}")
        lines.append((f"{lower} < {higher}", *cells))
    return _table(lines)


def differences(report: Report, task: str, lower: str, higher: str) -> list[float]:
    """Of the means of all questions, in points, seed by seed."""
    pairs = zip(scores(report, task, higher, "all"), scores(report, task, lower, "all"))
    return [a - b for a, b in pairs]


def verdict(of_seeds: Sequence[float]) -> str:
    """Reproduced, or the opposite, where all seeds agree and the mean is at least two standard deviations."""
    if abs(statistics.fmean(of_seeds)) < 2 * statistics.stdev(of_seeds):
        return "not decided"
    if min(of_seeds) > 0:
        return "reproduced"
    return "the opposite" if max(of_seeds) < 0 else "not decided"


def spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"


def _table(lines: Sequence[tuple[str, ...]]) -> str:
    first, *rest = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join((first, "| --- " * (first.count("|") - 1) + "|", *rest))


def panels(task: str) -> dict[str, list[tuple[float, str]]]:
    """Title -> (place on the axis, question) of each panel of a task's picture."""
    found: dict[str, list[tuple[float, str]]] = {}
    for what in study.TASKS[task].ask:
        if task == "recall":
            pairs, length = (int(part) for part in what.split(" in "))
            tight = length == 5 * pairs + study.FILLERS[0]
            title, x = ("pairs to remember", pairs) if tight else ("16 pairs, length", length)
        else:
            title, _, x = what.rpartition(" ")
        found.setdefault(title, []).append((float(x), what))
    return found


def draw(report: Report, folder: Path) -> None:
    """recall-<task>.png for each task: the mean over seeds, and their range as a band."""
    for task in study.TASKS:
        titles = panels(task)
        lowest = min(min(scores(report, task, variant, what)) for variant in VARIANTS for what in study.TASKS[task].ask)
        figure, row = plt.subplots(1, len(titles), figsize=(4 * len(titles), 4), sharey=True, layout="constrained")
        for axes, (title, points) in zip(row, titles.items()):
            for i, variant in enumerate(VARIANTS):
                xs = [x for x, _ in points]
                samples = [scores(report, task, variant, what) for _, what in points]
                style = {"color": f"C{i}", "linestyle": "--" if "only" in variant else "-"}
                axes.plot(xs, [statistics.fmean(s) for s in samples], marker=".", label=variant, **style)
                axes.fill_between(xs, [min(s) for s in samples], [max(s) for s in samples], color=f"C{i}", alpha=0.07)
            axes.set_xscale("log", base=2)
            axes.set_xticks(xs, [f"{x:g}" for x in xs])
            axes.set(title=title, xlabel="pairs" if title.startswith("pairs") else "tokens")
            axes.grid(alpha=0.3)
        row[0].set(ylabel="answers right, %", ylim=(10 * (lowest // 10), 101))
        row[0].legend(fontsize=7, loc="lower left")
        figure.savefig(folder / f"recall-{task}.png", dpi=90)
        plt.close(figure)
