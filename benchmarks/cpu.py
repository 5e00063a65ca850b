"""`make bench-cpu`: this library against other implementations and the floors of the machine, in one interleaved run.

Prints the tables, writes cpu-<date>.json and cpu-<date>.png. Exit status 1 if a peer, or this library, is wrong.
docs/benchmarks.md explains the columns.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import floors, ggml_peer, onnx_file, report
from benchmarks.core_peer import Core
from benchmarks.measure import Settings, Table, measure
from benchmarks.onnxruntime_peer import BodyInOnnxRuntime, LibraryInOnnxRuntime, OnnxRuntime, OnnxRuntimeInPlace
from benchmarks.peers import CompiledReference, Forward, Library, NaiveLoop, Operator, Peer
from benchmarks.problems import PROBLEMS, Problem

PEERS: tuple[type[Peer], ...] = (
    Library,
    Operator,
    Core,
    Forward,
    LibraryInOnnxRuntime,
    BodyInOnnxRuntime,
    OnnxRuntime,
    OnnxRuntimeInPlace,
    ggml_peer.Ggml,
    CompiledReference,
    NaiveLoop,
)
RESULTS = Path(__file__).with_name("results")


def run(
    out: Path,
    *,
    threads: int = 2,
    settings: Settings | None = None,
    problems: Sequence[Problem] = PROBLEMS,
    peers: Sequence[type[Peer]] = PEERS,
    files: Sequence[int] = onnx_file.TOKENS,
) -> Table:
    """Measures, prints, writes cpu-<date>.json and .png into out."""
    settings = settings or Settings()
    torch.set_num_threads(threads)
    machine = report.machine()
    table = measure(problems, peers, threads, settings, floors.build())
    onnx_file.measure_file(table, files, threads, settings)
    now = datetime.datetime.now(datetime.timezone.utc)
    about = {
        "date": now.isoformat(timespec="seconds"),
        "command": f"python -m benchmarks.cpu --threads {threads} --rounds {settings.rounds}",
        "commit": _commit(),
        "machine": machine | {"load after": os.getloadavg()},
        "versions": versions(),
        "threads": threads,
        "settings": asdict(settings),
    }
    taken = sum(len(r.seconds) for r in table.rows) + sum(len(x) for f in table.floors.values() for x in f.values())
    quiet = f"{sum(table.disturbed.values())} of {taken} samples disturbed by other programs"
    line = f"{machine['cpu']}, {machine['cores']} cores, {threads} threads, float32, {now:%Y-%m-%d}, {quiet}"
    print(line, "\n", sep="")
    print(report.text(table), "\n")
    if list(problems) == list(PROBLEMS) and list(files) == list(onnx_file.TOKENS):
        print(report.targets(table))
    out.mkdir(parents=True, exist_ok=True)
    report.write_json(table, about, out / f"cpu-{now:%Y-%m-%d}.json")
    report.plot(table, line, out / f"cpu-{now:%Y-%m-%d}.png")
    return table


def versions() -> dict[str, str | None]:
    """Of the packages measured; None where one is not installed."""
    found: dict[str, str | None] = {"python": sys.version.split()[0], "ggml": ggml_peer.version()}
    for package in ("gdn2-ops", "torch", "onnxruntime", "onnx", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def _commit() -> str | None:
    """Of the sources, with -dirty if they were changed; None outside git."""
    describe = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="of every peer (2)")
    parser.add_argument("--rounds", type=int, default=Settings.rounds, help=f"samples a peer ({Settings.rounds})")
    parser.add_argument("--only", default="", help="problems whose name contains this")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON and the plot")
    args = parser.parse_args()
    problems = [p for p in PROBLEMS if args.only in str(p)]
    files = [T for T in onnx_file.TOKENS if args.only in onnx_file.name(T)]
    if not problems and not files:
        every = [*map(str, PROBLEMS), *map(onnx_file.name, onnx_file.TOKENS)]
        parser.error(f"expected --only to match one of {every}, got {args.only!r}")
    table = run(args.out, threads=args.threads, settings=Settings(rounds=args.rounds), problems=problems, files=files)
    wrong = [f"{row.problem}: {row.peer}" for row in table.rows if row.status == "wrong"]
    print(*(f"wrong: {w}" for w in wrong), sep="\n", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
