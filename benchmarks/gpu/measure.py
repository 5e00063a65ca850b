"""Interleaved timing of a problem: every round takes one sample of every contender in every mode."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from benchmarks.gpu.device import Device
from benchmarks.gpu.peers import Contender, error, expected, sliced
from benchmarks.gpu.plan import Inputs, Problem, inputs

WRONG_ABOVE = 3e-2  # relative norm; bfloat16 outputs and gradients are at 2e-3 to 1e-2
MODES = ("eager, cold", "eager, warm", "graph, cold", "graph, warm")


@dataclass(frozen=True)
class Settings:
    """rounds: samples of each contender and mode. warm_calls: calls of a warm sample, back to back. minutes: of the
    whole run; problems that do not fit are reported as not run."""

    rounds: int = 20
    warm_calls: int = 5
    minutes: float = 7.0


@dataclass
class Row:
    """status: ok, wrong, or why there are no times. seconds: mode -> a sample for each round."""

    problem: str
    contender: str
    status: str
    error: float | None = None
    peak_bytes: int | None = None
    seconds: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class Table:
    """bytes: problem -> compulsory bytes. copy_rates: of the device, one before each problem."""

    rows: list[Row] = field(default_factory=list)
    bytes: dict[str, int] = field(default_factory=dict)
    copy_rates: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def measure(
    problems: Sequence[Problem],
    contenders: Sequence[type[Contender]],
    device: Device,
    settings: Settings,
    save: Callable[[Table], None] = lambda table: None,
    clock: Callable[[], float] = time.monotonic,
) -> Table:
    """Every problem until the minutes are over. save is called after each, so that a run cut off has what it had."""
    table, end = Table(), clock() + 60 * settings.minutes
    longest = 0.0
    for problem in problems:
        started = clock()
        table.bytes[str(problem)] = problem.compulsory_bytes
        if started + longest > end:
            table.rows += [Row(str(problem), c.name, "not run: out of time") for c in contenders if problem.op in c.ops]
            continue
        table.copy_rates[str(problem)] = device.copy_rate()
        table.rows += _one(problem, [c for c in contenders if problem.op in c.ops], device, settings)
        longest = max(longest, clock() - started)
        save(table)
        print(f"{problem}: {clock() - started:.0f} s", flush=True)
    return table


def _one(problem: Problem, contenders: Sequence[type[Contender]], device: Device, settings: Settings) -> list[Row]:
    rows, ready = [], {}
    x = inputs(problem, device.device)
    wanted = expected(problem, x)
    for contender in contenders:
        row = Row(str(problem), contender.name, contender.missing() or "ok")
        rows.append(row)
        if row.status == "ok":
            try:
                calls = _prepare(problem, contender(), x, wanted, device, row)
            except Exception as failure:  # a contender that fails is a row, not the end of the run
                row.status = f"failed: {type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"
                continue
            ready |= {(row.contender, mode): call for mode, call in calls.items()}
    samples = _interleave(ready, device, settings)
    for row in rows:
        row.seconds = {mode: samples[row.contender, mode] for mode in MODES if (row.contender, mode) in samples}
    return rows


def _prepare(
    problem: Problem, contender: Contender, x: Inputs, wanted: tuple[Tensor, ...], device: Device, row: Row
) -> dict[str, Callable[[], object]]:
    """mode -> call; fills error, status, memory and notes of the row."""
    own = Inputs(*x.six, x.state.clone(), x.cu_seqlens)  # steps overwrite it
    call = _without_autograd(problem, contender.prepare(problem, own))
    outputs = call()
    if contender.checked:
        row.error = error(sliced(problem, outputs, own.state), wanted)
        row.status = "ok" if row.error <= WRONG_ABOVE else "wrong"
    del outputs
    call()
    row.peak_bytes = device.peak_bytes(call)
    calls = dict.fromkeys(("eager, cold", "eager, warm"), call)
    if problem.op != "train":
        try:
            replay = device.captured(call)
        except RuntimeError as failure:
            row.notes.append(f"no CUDA graph: {str(failure).splitlines()[0]}")
        else:
            calls |= dict.fromkeys(("graph, cold", "graph, warm"), replay)
    return calls


def _without_autograd(problem: Problem, call: Callable) -> Callable:
    if problem.op == "train":
        return call

    def quiet():
        with torch.inference_mode():
            return call()

    return quiet


def _interleave(calls: dict, device: Device, settings: Settings) -> dict[tuple[str, str], list[float]]:
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    keys = list(calls)
    gc.collect()
    gc.disable()
    try:
        for i in range(settings.rounds):
            first = i % max(len(keys), 1)
            for key in keys[first:] + keys[:first]:
                cold = key[1].endswith("cold")
                samples[key].append(device.seconds(calls[key], cold=cold, calls=settings.warm_calls))
    finally:
        gc.enable()
    return samples
