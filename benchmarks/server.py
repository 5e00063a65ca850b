"""The real server against the loop it serves, in one interleaved run: what a stream costs.

    make bench-server      # a table, docs/server.json and docs/server.png

For 1, 8 and 64 sequences and prompts of 16 and 1,024 bytes: `in process` is the scheduler on the exported file,
`served` are server-sent events to a process of its own that does nothing else. Rounds alternate; numbers are medians of
rounds, percentiles are of all gaps between the parts of a stream, which have several tokens when there are many.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import numpy as np

from gdn2_ops.export.model_repository import Serving, write_repository
from gdn2_ops.model import GDN2LM
from gdn2_ops.runtime.client import Client
from gdn2_ops.runtime.generate import tokens_of
from gdn2_ops.runtime.scheduler import Scheduler
from gdn2_ops.runtime.server import DEFAULT_ENVIRONMENT, Server
from gdn2_ops.runtime.state_pool import StatePool

ROOT = Path(__file__).parents[1]
TINY = ROOT / "examples" / "models" / "tiny"
SEQUENCES, PROMPTS = (1, 8, 64), (16, 1024)
COUNT = {1: 256, 8: 256, 64: 128}  # tokens of each sequence
Arrivals = list[list[tuple[float, int]]]  # of each stream: seconds since the beginning, tokens so far


def prompts(sequences: int, length: int) -> list[bytes]:
    text = (ROOT / "gdn2_ops" / "model.py").read_bytes()
    return [text[31 * i : 31 * i + length] for i in range(sequences)]


def in_process(pool: StatePool, sequences: int, length: int) -> Arrivals:
    scheduler, count = Scheduler(pool), COUNT[sequences]
    began = time.perf_counter()
    generations = [scheduler.submit(tokens_of(prompt), count) for prompt in prompts(sequences, length)]
    arrivals: Arrivals = [[] for _ in generations]
    while scheduler.live or scheduler.waiting:
        scheduler.step()
        now = time.perf_counter() - began
        for generation, stream in zip(generations, arrivals):
            if generation.written and (not stream or stream[-1][1] < len(generation.written)):
                stream.append((now, len(generation.written)))
    return arrivals


def streams(address: str, sequences: int, length: int) -> Arrivals:
    """What the process of the client runs: all streams at once."""
    arrivals: Arrivals = [[] for _ in range(sequences)]
    together = threading.Barrier(sequences)

    def one(i: int, prompt: bytes) -> None:
        together.wait()
        began, tokens = time.perf_counter(), 0
        for part in Client(address).generate(prompt, COUNT[sequences]):
            tokens += len(part)
            arrivals[i].append((time.perf_counter() - began, tokens))

    threads = [threading.Thread(target=one, args=item) for item in enumerate(prompts(sequences, length))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return arrivals


def served(address: str, sequences: int, length: int) -> Arrivals:
    command = [sys.executable, "-m", "benchmarks.server", "--client", address, str(sequences), str(length)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=ROOT).stdout)


def summary(rounds: list[Arrivals]) -> dict[str, float]:
    """First token (ms), tokens of all streams per second, and the gap between tokens of one stream (ms)."""
    first = [stream[0][0] for arrivals in rounds for stream in arrivals]
    rates = [sum(s[-1][1] for s in arrivals) / max(s[-1][0] for s in arrivals) for arrivals in rounds]
    gaps = np.concatenate([np.diff([t for t, _ in stream]) for arrivals in rounds for stream in arrivals])
    steps = [(s[-1][0] - s[0][0]) / (s[-1][1] - s[0][1]) for arrivals in rounds for s in arrivals if s[-1][1] > s[0][1]]
    return {
        "first_ms": median(first) * 1e3,
        "tokens_per_s": median(rates),
        "ms_per_token": median(steps) * 1e3,
        "gap_p50_ms": float(np.percentile(gaps, 50)) * 1e3,
        "gap_p99_ms": float(np.percentile(gaps, 99)) * 1e3,
    }


def measure(rounds: int) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        repository = write_repository(GDN2LM.from_pretrained(TINY), Path(folder) / "models", serving=Serving(threads=1))
        pool = StatePool(repository / "gdn2_decode" / "1" / "model.onnx", max(SEQUENCES), threads=1)
        rows = []
        with Server(repository, DEFAULT_ENVIRONMENT) as server:
            for length in PROMPTS:
                for sequences in SEQUENCES:
                    calls = {
                        "in process": lambda n=sequences, T=length: in_process(pool, n, T),
                        "served": lambda n=sequences, T=length: served(server.http, n, T),
                    }
                    results: dict[str, list[Arrivals]] = {name: [] for name in calls}
                    for _ in range(rounds):
                        for name, call in calls.items():
                            results[name].append(call())
                    rows += [
                        {"what": name, "sequences": sequences, "prompt": length, **summary(result)}
                        for name, result in results.items()
                    ]
        return rows


def table(rows: list[dict]) -> str:
    columns = ("first_ms", "tokens_per_s", "ms_per_token", "gap_p50_ms", "gap_p99_ms")
    lines = ["| prompt | sequences | | " + " | ".join(columns) + " |", "|" + "---|" * (3 + len(columns))]
    for row in rows:
        numbers = " | ".join(f"{row[name]:,.2f}" if row[name] < 100 else f"{row[name]:,.0f}" for name in columns)
        lines.append(f"| {row['prompt']} | {row['sequences']} | {row['what']} | {numbers} |")
    return "\n".join(lines)


def plot(rows: list[dict], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5))
    for axis, (name, label) in zip(axes, (("tokens_per_s", "tokens/s, all streams"), ("first_ms", "first token, ms"))):
        for what, style in (("in process", "--"), ("served", "-")):
            for length, colour in zip(PROMPTS, ("tab:blue", "tab:orange")):
                picked = [row for row in rows if row["what"] == what and row["prompt"] == length]
                xs, ys = [row["sequences"] for row in picked], [row[name] for row in picked]
                axis.plot(xs, ys, style, marker="o", color=colour, label=f"{what}, prompt {length}")
        axis.set(xscale="log", yscale="log", xlabel="sequences", ylabel=label)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--client", nargs=3, metavar=("ADDRESS", "SEQUENCES", "PROMPT"), help="internal: one round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    if options.client:
        address, sequences, length = options.client
        print(json.dumps(streams(address, int(sequences), int(length))))
        return 0
    rows = measure(options.rounds)
    print(table(rows))
    (options.output / "server.json").write_text(json.dumps(rows, indent=1) + "\n")
    plot(rows, options.output / "server.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
