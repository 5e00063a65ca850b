"""The ONNX file of the tiny model in ONNX Runtime, with this library's kernels and with the function body in the file.

A row's error, in logits and states: of the body, against eager PyTorch; of the kernels, against the body. An error of 0
is wrong: the same kernels ran twice.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

from benchmarks.measure import WRONG_ABOVE, Row, Settings, Table, interleave
from benchmarks.onnxruntime_peer import BodyInOnnxRuntime, LibraryInOnnxRuntime
from benchmarks.problems import error
from gdn2_ops import corpus
from gdn2_ops.model import GDN2LM

MODEL = Path(__file__).resolve().parent.parent / "examples/models/tiny"
PEERS = (LibraryInOnnxRuntime, BodyInOnnxRuntime)
TOKENS = (1, 512)
BEFORE = 64  # bytes that the model has read already


def name(T: int) -> str:
    return f"file T={T}"


def measure_file(table: Table, tokens: Sequence[int], threads: int, settings: Settings) -> None:
    """Adds a problem for each number of tokens that the file reads in one call."""
    if not tokens:
        return
    with tempfile.TemporaryDirectory() as folder:
        sessions, missing = _sessions(Path(folder) / "tiny.onnx", threads)
    for T in tokens:
        rows = {peer.name: Row(name(T), peer.name, peer.gates, missing.get(peer.name, "ok")) for peer in PEERS}
        calls = _checked(T, sessions, rows)
        samples, table.disturbed[name(T)] = interleave(calls, {}, settings) if calls else ({}, 0)
        for peer, row in rows.items():
            row.seconds = samples.get(peer, [])
        table.rows += rows.values()
        table.floors[name(T)] = {}
        print(f"{name(T)}: {table.disturbed[name(T)]} samples disturbed", file=sys.stderr, flush=True)


def _sessions(file: Path, threads: int) -> tuple[dict, dict[str, str]]:
    """By the name of a peer: its session, or why there is none."""
    missing = {peer.name: text for peer in PEERS if (text := peer.missing())}
    try:
        from gdn2_ops.export.onnx import export
        from gdn2_ops.runtime.session import open_session

        export(GDN2LM.from_pretrained(MODEL).eval(), file)
    except ImportError as error:
        return {}, {peer.name: str(error) for peer in PEERS}
    here = [peer for peer in PEERS if peer.name not in missing]
    return {
        peer.name: open_session(file, threads=threads, library=peer is LibraryInOnnxRuntime) for peer in here
    }, missing


def _checked(T: int, sessions: dict, rows: dict[str, Row]) -> dict[str, Callable[[], object]]:
    """The calls that are timed. The body first: it is what the kernels are compared with, and never their equal."""
    calls: dict[str, Callable[[], object]] = {}
    if not sessions:
        return calls
    feed, wanted = _problem(T, [x.name for x in next(iter(sessions.values())).get_inputs()])
    for peer in reversed(sessions):
        calls[peer] = partial(sessions[peer].run, None, feed)
        got = tuple(torch.from_numpy(x) for x in sessions[peer].run(None, feed))
        rows[peer].error, wanted = error(got, wanted), got
        rows[peer].status = "ok" if 0 < rows[peer].error <= WRONG_ABOVE else "wrong"
    return calls


def _problem(T: int, names: list[str]) -> tuple[dict, tuple[torch.Tensor, ...]]:
    """The inputs of the file for T bytes of held-out text after BEFORE others, and eager PyTorch's answer."""
    model = GDN2LM.from_pretrained(MODEL).eval()
    text = torch.tensor([list(corpus.held_out_text(BEFORE + T))])
    with torch.inference_mode():
        state = model(text[:, :BEFORE]).state
        logits, after = model(text[:, BEFORE:], state)
    feed = dict(zip(names, (x.numpy() for x in (text[:, BEFORE:], *tree_leaves(state))), strict=True))
    return feed, (logits, *tree_leaves(after))
