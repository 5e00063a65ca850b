"""Interleaved timing: every round runs every peer once, in a rotating order, after a pause."""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.floors import Floors
from benchmarks.peers import Peer
from benchmarks.problems import Problem, answer, error, inputs

WRONG_ABOVE = 1e-4  # of the largest entry; float32 over 2048 tokens is at 1e-6
OTHERS_ABOVE = 0.25  # processors in use by others; the system counts in ticks of 10 ms, so less is noise
PAUSE_S = 0.5


@dataclass(frozen=True)
class Settings:
    """rounds: samples of each peer. block_s: of one sample. settle_s: the pause before it, in which the threads that
    the peer before keeps spinning go to sleep. patience_s: of waiting for other programs, for each problem."""

    rounds: int = 15
    block_s: float = 0.03
    settle_s: float = 0.02
    patience_s: float = 20.0


@dataclass
class Row:
    """status: ok, wrong, or why there is no time. seconds: for one call, one sample a round."""

    problem: str
    peer: str
    gates: str
    status: str
    error: float | None = None
    seconds: list[float] = field(default_factory=list)


@dataclass
class Table:
    """floors: problem -> name -> seconds, one sample a round. disturbed: problem -> samples that others ran during."""

    rows: list[Row] = field(default_factory=list)
    disturbed: dict[str, int] = field(default_factory=dict)
    floors: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def row(self, problem: object, peer: str) -> Row:
        return next(r for r in self.rows if (r.problem, r.peer) == (str(problem), peer))


def measure(
    problems: Sequence[Problem], peers: Sequence[type[Peer]], threads: int, settings: Settings, library: object
) -> Table:
    """Every problem with every peer that has its operation: checked first, then timed whether right or wrong."""
    table = Table()
    for problem in problems:
        started = time.perf_counter()
        floors = Floors(problem, threads, library)
        with torch.inference_mode(problem.op != "backward"):  # as a server does: autograd is not on the way
            ready, rows = _prepare(problem, peers, threads)
            samples, disturbed = interleave(ready, floors.probes(), settings)
        for row in rows:
            row.seconds = samples.get(row.peer, [])
        table.rows += rows
        table.disturbed[str(problem)] = disturbed
        table.floors[str(problem)] = {name: samples[name] for name in floors.probes()}
        print(
            f"{problem}: {time.perf_counter() - started:.0f} s, {disturbed} samples disturbed",
            file=sys.stderr,
            flush=True,
        )
    return table


def _prepare(
    problem: Problem, peers: Sequence[type[Peer]], threads: int
) -> tuple[dict[str, Callable[[], object]], list[Row]]:
    x = inputs(problem)
    wanted = answer(problem, x)
    ready: dict[str, Callable[[], object]] = {}
    rows = []
    for peer in peers:
        if problem.op not in peer.ops:
            continue
        row = Row(str(problem), peer.name, peer.gates, peer.missing() or "ok")
        rows.append(row)
        if row.status == "ok":
            ready[row.peer] = prepared = peer(problem, x, threads)
            row.error = error(prepared.result(), wanted)
            row.status = "ok" if row.error <= WRONG_ABOVE else "wrong"
    return ready, rows


def interleave(
    calls: dict[str, Callable[[], object]], probes: dict[str, Callable[[], float]], settings: Settings
) -> tuple[dict[str, list[float]], int]:
    """Seconds of a call for each name, one sample a round, and how many samples others disturbed.

    A probe returns its own seconds. A sample during which others used the processors is taken again when they have
    had time to finish, until `patience_s` is used up.
    """
    samples: dict[str, list[float]] = {name: [] for name in (*calls, *probes)}
    names, disturbed, waited = list(samples), 0, 0.0
    gc.collect()
    gc.disable()
    try:
        for i in range(settings.rounds):
            first = i % len(names)
            for name in names[first:] + names[:first]:
                while True:
                    others, start = _seconds_of_others(), time.perf_counter()
                    time.sleep(settings.settle_s)
                    sample = probes[name]() if name in probes else _block(calls[name], settings.block_s)
                    alone = _seconds_of_others() - others <= OTHERS_ABOVE * (time.perf_counter() - start)
                    if alone or waited >= settings.patience_s:
                        break
                    time.sleep(PAUSE_S)
                    waited += time.perf_counter() - start
                samples[name].append(sample)
                disturbed += not alone
    finally:
        gc.enable()
    return samples, disturbed


def _seconds_of_others() -> float:
    """Processor time since boot that was not ours, that taken by the hypervisor included. 0 where nobody counts it."""
    try:
        user, nice, system, _, _, irq, softirq, steal = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except (OSError, ValueError):
        return 0.0
    ticks = sum(int(x) for x in (user, nice, system, irq, softirq, steal))
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


def _block(call: Callable[[], object], block_s: float) -> float:
    """The median over calls that fill block_s, after a third of it, and at least one call, as warm-up."""
    _fill(call, block_s / 3)
    return statistics.median(_fill(call, block_s))


def _fill(call: Callable[[], object], seconds: float) -> list[float]:
    times = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times
