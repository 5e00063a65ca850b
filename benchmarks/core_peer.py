"""The C++ core without a framework before it, as ggml is called: a C function, its threads OpenMP's."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import native
from benchmarks.problems import NAMES, Inputs, Problem

SOURCE = Path(__file__).with_name("core.cpp")
ROOT = SOURCE.parent.parent
SIZES = ("N", "T", "H", "K", "V", "threads")
POINTERS = (*NAMES, "o", "do", *(f"d{name}" for name in NAMES))


class _Call(ctypes.Structure):
    _fields_ = (*((x, ctypes.c_int64) for x in SIZES), *((x, ctypes.c_void_p) for x in POINTERS))


def _archive() -> Path | None:
    """The core as the package's build left it, the newest one."""
    built = sorted(ROOT.glob("build/*/custom_ops/native/libgdn2_core.a"), key=lambda file: file.stat().st_mtime)
    return built[-1] if built else None


class Core:
    """A step overwrites its state, a chunk writes the final one over it, gradients go where the last ones went."""

    name = "gdn2_ops, C++ core"
    gates = "GDN-2"
    ops = ("step", "chunk", "backward")

    @staticmethod
    def missing() -> str | None:
        return None if _archive() else "not built here: make install"

    def __init__(self, problem: Problem, x: Inputs, threads: int) -> None:
        archive = _archive()
        assert archive is not None
        self.function = getattr(
            native.load(SOURCE, include=[ROOT / "custom_ops/native"], archives=[archive]), problem.op
        )
        *rows, state = (t.contiguous() for t in x.tensors())
        self.results: tuple[Tensor, ...] = (torch.empty_like(x.v), state.clone())  # o, state
        self.memory = (*rows, self.results[1], self.results[0])
        if problem.op == "backward":
            assert x.do is not None
            self.results = tuple(torch.empty_like(t) for t in (*rows, state))
            self.memory += (x.do.contiguous(), *self.results)
        sizes = (problem.N, problem.T, problem.H, problem.K, problem.V, threads)
        self.call = _Call(*sizes, *(t.data_ptr() for t in self.memory))
        self.pointer = ctypes.byref(self.call)

    def __call__(self) -> None:
        self.function(self.pointer)

    def result(self) -> tuple[Tensor, ...]:
        self()
        return tuple(t.clone() for t in self.results)
