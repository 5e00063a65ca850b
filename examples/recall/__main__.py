"""`make recall`: trains every variant on every task, and writes benchmarks/results/recall.json and docs/recall.md.

python -m examples.recall                       # everything, two processes
python -m examples.recall --tasks needles       # a part; what is done is not done again
python -m examples.recall --report              # docs and pictures from benchmarks/results/recall.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from examples.recall import report, study
from examples.recall.variants import VARIANTS

ROOT = Path(__file__).resolve().parent.parent.parent
RECORDS = ROOT / "build" / f"recall-{study.fingerprint()}.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=study.TASKS, default=list(study.TASKS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    parser.add_argument("--records", type=Path, default=RECORDS, help="where finished runs are kept")
    parser.add_argument("--report", action="store_true", help="train nothing")
    options = parser.parse_args()
    if not options.report:
        for task in options.tasks:
            perform(f"{task}, rates", study.selection_runs(task, options.variants), options)
            perform(task, study.reported_runs(task, study.load(options.records), options.variants), options)
        records = study.load(options.records)
        missing = report.missing(records)
        if missing:
            print(f"{len(missing)} runs are left for a report, the first one is {missing[0]}")
            return
        report.RESULT.write_text(json.dumps({**machine(), "runs": report.ordered(records)}, indent=1) + "\n")
    report.write(json.loads(report.RESULT.read_text()))
    print(f"wrote {report.RESULT.relative_to(ROOT)} and {report.DOCUMENT.relative_to(ROOT)}")


def perform(name: str, runs: Sequence[study.Run], options: argparse.Namespace) -> None:
    """Trains what has no record yet."""
    done = {study.key(record) for record in study.load(options.records)}
    left = [run for run in runs if run not in done]
    bar = tqdm(total=len(runs), initial=len(runs) - len(left), unit="run", desc=name, smoothing=0.1)
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(options.processes, max(1, len(left)))) as pool:
        for record in pool.imap_unordered(study.train, left):
            study.append(options.records, record)
            bar.update()
            bar.set_postfix_str(f"{record['variant']} {sum(record['scores'].values()) / len(record['scores']):.3f}")
    bar.close()


def machine() -> dict:
    """Where it ran."""
    processor = platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        processor = names[0].split(":")[1].strip() if names else processor
    if study.DEVICE.type == "cuda":
        processor += f" with {torch.cuda.get_device_name()}"
    return {
        "command": "make recall",
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"processor": processor, "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


if __name__ == "__main__":
    sys.exit(main())
