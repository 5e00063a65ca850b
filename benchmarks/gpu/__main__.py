"""`make gpu-bench`: writes gpu-<date>.json after every problem, gpu-<date>.md and .png at the end, prints the tables.

Exit status 1 if this library is wrong somewhere. On a machine without a GPU it says so and measures nothing.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import fla_peer
from benchmarks.gpu import report
from benchmarks.gpu.device import Cuda, Device
from benchmarks.gpu.measure import Settings, Table, measure
from benchmarks.gpu.peers import CONTENDERS, OURS, Contender, compile_ahead
from benchmarks.gpu.plan import PROBLEMS, Problem


def run(
    out: Path,
    device: Device,
    settings: Settings,
    problems: Sequence[Problem] = PROBLEMS,
    contenders: Sequence[type[Contender]] = CONTENDERS,
    notes: Sequence[str] = (),
) -> Table:
    """Measures, prints, writes into out."""
    import triton

    now = datetime.datetime.now(datetime.timezone.utc)
    about = {
        "date": now.isoformat(timespec="seconds"),
        "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
        "device": device.about,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "fla-core": fla_peer.missing() or fla_peer.VERSION,
        },
        "settings": asdict(settings),
        "notes": list(notes),
    }
    path = out / f"gpu-{now:%Y-%m-%d}.json"
    table = measure(problems, contenders, device, settings, lambda table: report.write_json(table, about, path))
    report.write_json(table, about, path)
    line = f"{device.about.get('gpu')}, torch {torch.__version__}, triton {triton.__version__}, {now:%Y-%m-%d}"
    text = "\n\n".join([line, *notes, report.text(table), "**Targets**", report.targets(table)])
    path.with_suffix(".md").write_text(text + "\n")
    print(text)
    try:
        report.plot(table, line, path.with_suffix(".png"))
    except ImportError as error:
        print(f"\n{path.with_suffix('.png')} is not drawn: {error}; pip install matplotlib", file=sys.stderr)
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description="this library against fla-core on a GPU")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent.parent / "results")
    parser.add_argument("--minutes", type=float, default=Settings.minutes, help="of the whole run (default 7)")
    parser.add_argument("--only", default="", help="problems whose text has this in it")
    options = parser.parse_args()
    try:
        device = Cuda()
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    started = time.monotonic()
    problems = [problem for problem in PROBLEMS if options.only in str(problem)]
    failed = compile_ahead(problems, deadline_s=20 * options.minutes)
    spent = (time.monotonic() - started) / 60
    notes = [f"fla-core compiled ahead in {60 * spent:.0f} s", *(f"not compiled ahead: {text}" for text in failed)]
    settings = Settings(minutes=max(options.minutes - spent, 0.5))
    table = run(options.output, device, settings, problems, notes=notes)
    ours = [row for row in table.rows if row.contender == OURS]
    return int(any(row.status == "wrong" or row.status.startswith("failed") for row in ours))


if __name__ == "__main__":
    sys.exit(main())
