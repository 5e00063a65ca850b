"""The ONNX file of the tiny model in ONNX Runtime, with this library's kernels and with the function body in the file.

A row's error: of the body, against eager PyTorch; of the kernels, against the body. Both in logits and states.
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
TOKENS = (1, 512)
BEFORE = 64  # bytes that the model has read already


def name(T: int) -> str:
    return f"file T={T}"


def measure_file(table: Table, tokens: Sequence[int], threads: int, settings: Settings) -> None:
    """Adds a problem for each number of tokens that the file reads in one call."""
    if not tokens:
        return
    peers = (LibraryInOnnxRuntime, BodyInOnnxRuntime)
    missing = {peer.name: peer.missing() for peer in peers}
    with tempfile.TemporaryDirectory() as folder:
        sessions = {} if any(missing.values()) else _sessions(Path(folder) / "tiny.onnx", threads)
    for T in tokens:
        rows = {peer.name: Row(name(T), peer.name, peer.gates, missing[peer.name] or "ok") for peer in peers}
        table.rows += rows.values()
        table.floors[name(T)] = {}
        table.disturbed[name(T)] = 0
        if not sessions:
            continue
        feed, wanted = _problem(T, [x.name for x in next(iter(sessions.values())).get_inputs()])
        calls: dict[str, Callable[[], object]] = {peer: partial(s.run, None, feed) for peer, s in sessions.items()}
        for peer in reversed(peers):  # the body first: it is what the kernels are compared with
            got = tuple(torch.from_numpy(x) for x in sessions[peer.name].run(None, feed))
            row = rows[peer.name]
            row.error, wanted = error(got, wanted), got
            row.status = "ok" if row.error <= WRONG_ABOVE else "wrong"
        samples, table.disturbed[name(T)] = interleave(calls, {}, settings)
        for peer, row in rows.items():
            row.seconds = samples[peer]
        print(f"{name(T)}: {table.disturbed[name(T)]} samples disturbed", file=sys.stderr, flush=True)


def _sessions(file: Path, threads: int) -> dict:
    from gdn2_ops.export.onnx import export
    from gdn2_ops.runtime.session import open_session

    export(GDN2LM.from_pretrained(MODEL).eval(), file)
    kernels, body = open_session(file, threads=threads, library=True), open_session(file, threads=threads)
    return {LibraryInOnnxRuntime.name: kernels, BodyInOnnxRuntime.name: body}


def _problem(T: int, names: list[str]) -> tuple[dict, tuple[torch.Tensor, ...]]:
    """The inputs of the file for T bytes of held-out text after BEFORE others, and eager PyTorch's answer."""
    model = GDN2LM.from_pretrained(MODEL).eval()
    text = torch.tensor([list(corpus.held_out_text(BEFORE + T))])
    with torch.inference_mode():
        state = model(text[:, :BEFORE]).state
        logits, after = model(text[:, BEFORE:], state)
    feed = dict(zip(names, (x.numpy() for x in (text[:, BEFORE:], *tree_leaves(state))), strict=True))
    return feed, (logits, *tree_leaves(after))
