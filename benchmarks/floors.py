"""The floors of the machine under a problem, from floors.cpp."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from benchmarks import native
from benchmarks.problems import Problem

SOURCE = Path(__file__).with_name("floors.cpp")
PROBE_FMA = 300_000_000  # elements: about 3 ms
PROBE_BYTES = 400_000_000
PROBES = 6


def build() -> ctypes.CDLL:
    """Raises: RuntimeError: no C++ compiler, or it refuses the file."""
    loaded = native.load(SOURCE)
    loaded.seconds_of_fma.restype = loaded.seconds_of_scale.restype = ctypes.c_double
    loaded.seconds_of_fma.argtypes = (ctypes.c_int64, ctypes.c_int)
    loaded.seconds_of_scale.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int)
    return loaded


class Floors:
    """fma: the multiply-adds of the recurrence at the rate of registers. scale: the state read and written once.

    Each is one sample in seconds, the best of a few probes: a floor is what the machine can do. The scaled buffer has
    the size of the problem's states and so sits where they do. A chunk keeps its state in cache, so only its
    multiply-adds count; a backward has no floor here.
    """

    def __init__(self, problem: Problem, threads: int, library: ctypes.CDLL) -> None:
        self.problem, self.threads, self.library = problem, threads, library
        self.buffer = torch.ones(problem.state_bytes // 4)
        self.passes = max(1, PROBE_BYTES // (2 * problem.state_bytes))

    def probes(self) -> dict:
        return {"step": {"fma": self.fma, "scale": self.scale}, "chunk": {"fma": self.fma}}.get(self.problem.op, {})

    def fma(self) -> float:
        seconds = min(self.library.seconds_of_fma(PROBE_FMA, self.threads) for _ in range(PROBES))
        return seconds * self.problem.multiply_adds / PROBE_FMA

    def scale(self) -> float:
        n = self.buffer.numel()
        address = self.buffer.data_ptr()
        return min(self.library.seconds_of_scale(address, n, self.passes, self.threads) for _ in range(PROBES))
