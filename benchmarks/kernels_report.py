"""`make kernels-report`: what compilers made of the GPU kernels and the bytes they move, without a GPU.

Runs benchmarks.codegen and benchmarks.traffic, each in a process of its own (one compiles, the other interprets),
writes results/kernels.json, and the tables between the markers of docs/benchmarks.md. The peer's rows are made with
--peer, and otherwise kept. Nothing of it is a time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import fla_peer

ROOT = Path(__file__).resolve().parent.parent
OURS = "gdn2_ops"
DOCUMENT = ROOT / "docs" / "benchmarks.md"
RESULT = ROOT / "benchmarks" / "results" / "kernels.json"
BEGIN, END = "<!-- kernels-report: begin, written by make kernels-report -->", "<!-- kernels-report: end -->"
CODE = ("kernel", "sm", "dtype", "head", "warps", "registers", "spilled B", "shared KB", "blocks/SM", "HGMMA", "HMMA")


def text(report: dict[str, Any]) -> str:
    """Markdown of everything in a report."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    parts = [f"`make kernels-report`, {versions}. Compiled and counted, not run on a GPU.", _bytes(report["bytes"])]
    notes = "A peer's row is the one that spills least of the configurations that it would try on a Hopper."
    parts += [_code(report["code"]), notes if any(row["who"] != OURS for row in report["code"]) else ""]
    return "\n\n".join(part for part in parts if part)


def between_markers(document: str, new: str) -> str:
    """The document with what stands between the markers replaced.

    Raises: ValueError: not exactly one pair of markers.
    """
    if document.count(BEGIN) != 1 or document.count(END) != 1 or document.index(BEGIN) > document.index(END):
        raise ValueError(f"benchmarks.kernels_report: expected one pair of markers {BEGIN!r} .. {END!r}")
    before, rest = document.split(BEGIN)
    return f"{before}{BEGIN}\n\n{new}\n\n{END}{rest.split(END)[1]}"


def _bytes(counted: dict[str, dict[str, dict[str, dict[str, float]]]]) -> str:
    units = {"forward": "token and head", "backward": "token and head", "forward and backward": "token and head"}
    rows = []
    for who, problems in counted.items():
        for what, kernels in problems.items():
            memory, issued = (sum(kernel[way] for kernel in kernels.values()) for way in ("memory", "issued"))
            each = ", ".join(
                f"{name.removesuffix('_kernel')} {kernel['memory']:,.0f}" for name, kernel in kernels.items()
            )
            of = units.get(what, "row and head")
            rows.append((who, what, of, len(kernels), f"{memory:,.0f}", f"{issued:,.0f}", each))
    return _table(("", "what", "bytes for each", "kernels", "memory", "issued", "memory by kernel"), rows)


def _code(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        options = [f"{name} {value}" for name, value in row.get("options", {}).items() if name == "BACKWARD" and value]
        kernel = row["kernel"].removesuffix("_kernel") + (f" ({options[0].lower()})" if options else "")
        name = kernel if row["who"] == OURS else f"{row['who']}: {kernel}"
        tensor = (row["HGMMA"] or row["UTCMMA"], row["HMMA"])
        shared = f"{row['shared'] / 1024:.0f}"
        head = str(row["K"]) if row["K"] == row["V"] else f"{row['K']}, {row['V']}"
        left = (name, row["arch"], row["dtype"], head, row["warps"], row["registers"], row["stack"], shared)
        lines.append((*left, row["blocks_per_sm"], *tensor))
    return _table(CODE, lines)


def _table(head: tuple, rows: list[tuple]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def gather(peer: bool, before: dict[str, Any] | None) -> dict[str, Any]:
    """Runs both processes. before: the last report, whose rows of the peer are kept without `peer`."""
    import triton

    versions, others = {"triton": triton.__version__}, {"versions": {}, "bytes": {}, "code": []}
    code = _json("benchmarks.codegen", "0", *(["--peer"] if peer else []))
    counted = _json("benchmarks.traffic", "1", *(["--peer"] if peer else []))
    if peer:
        versions["fla-core"] = fla_peer.VERSION
    elif before is not None:
        others = before
    kept = {who: found for who, found in others["bytes"].items() if who != OURS}
    rows = [*code, *(row for row in others["code"] if row["who"] != OURS)]
    rows.sort(key=lambda row: row["who"] != OURS)
    return {"versions": others["versions"] | versions, "bytes": counted | kept, "code": rows}


def _json(module: str, interpret: str, *arguments: str) -> Any:
    command = [sys.executable, "-m", module, *arguments]
    environment = os.environ | {"TRITON_INTERPRET": interpret}
    return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, cwd=ROOT).stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description="registers, spills, instructions and bytes of every GPU kernel")
    parser.add_argument("--peer", action="store_true", help="fla-core's rows anew: every configuration of it, minutes")
    options = parser.parse_args()
    before = json.loads(RESULT.read_text()) if RESULT.is_file() else None
    report = gather(options.peer, before)
    written = between_markers(DOCUMENT.read_text(), text(report))
    RESULT.write_text(json.dumps(report).replace("}, {", "},\n{") + "\n")  # a line for each row
    DOCUMENT.write_text(written)
    print(text(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
