"""The problems of gpu-bench in the order of their weight, and the targets. Fixed before anything was measured, with
shapes that we may lose: few heads, short sequences, uneven packed ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

OPS = ("chunk", "train", "step", "step_layer")


@dataclass(frozen=True)
class Problem:
    """op: chunk (forward), train (forward and backward), step (in place), step_layer (one token of a whole layer).
    gates: weak, trained, strong. packed: lengths of sequences in one row; then B = 1 and T is their sum."""

    op: str
    B: int
    T: int
    H: int
    K: int = 128
    V: int = 128
    gates: str = "trained"
    state: str = "fp32"
    packed: tuple[int, ...] | None = None

    def __str__(self) -> str:
        shape = f"B = {self.B}" + (f", T = {self.T}" if self.op in ("chunk", "train") else "") + f", H = {self.H}"
        more = [f"{self.gates} gates"] if self.gates != "trained" else []
        more += [f"{len(self.packed)} packed sequences"] if self.packed else []
        more += ["bf16 state"] if self.state == "bf16" else []
        size = "" if self.K == self.V == 128 else f", K = {self.K}, V = {self.V}"
        return f"{self.op}, {shape}{size}" + "".join(f", {text}" for text in more)

    @property
    def sequences(self) -> int:
        return len(self.packed) if self.packed else self.B

    @property
    def compulsory_bytes(self) -> int:
        """Each input read once and each output written once: 16-bit q, k, v, b, w, o, float32 decay and state."""
        tokens = self.B * self.T * self.H
        inputs, output = tokens * (3 * self.K * 2 + self.K * 4 + 2 * self.V * 2), tokens * self.V * 2
        states = 2 * self.sequences * self.H * self.K * self.V * (2 if self.state == "bf16" else 4)
        if self.op == "train":  # do comes in, six gradients and that of the state go out; forward and backward read
            return inputs + output + states + (2 * inputs + output) + states
        return inputs + output + states


_UNEVEN = (3000, 17, 900, 64, 2111, 1, 1500, 599)  # 8192 tokens
PROBLEMS = (
    *(Problem("chunk", 1, 8192, H) for H in (96, 16, 64, 32)),
    *(Problem("step", B, 1, 32) for B in (64, 512, 1, 8)),
    Problem("train", 8, 4096, 16),
    *(Problem("chunk", 1, T, 16) for T in (1024, 64, 256)),
    *(Problem("step", B, 1, 32, state="bf16") for B in (64, 512)),
    *(Problem("step_layer", B, 1, 32) for B in (1, 8, 64)),
    Problem("chunk", 1, 8192, 64, gates="weak"),
    Problem("chunk", 1, 8192, 64, gates="strong"),
    Problem("chunk", 1, 8192, 12),
    Problem("chunk", 1, 8192, 16, packed=_UNEVEN),
    Problem("chunk", 8, 1024, 64),
    Problem("step", 16, 1, 32, gates="strong"),
)


@dataclass(frozen=True)
class Target:
    """metric: "speed-up" over fla-core at its best in the same run, cold, at least; "ms" in eager mode, cold, at most;
    "us, graph" of a replay, at most; "of the copy", at least. must, stretch: None is no such target."""

    problem: Problem
    metric: str
    must: float | None
    stretch: float | None

    def verdict(self, measured: float | None) -> str:
        if measured is None:
            return "not measured"
        for name, bound in (("stretch", self.stretch), ("must", self.must)):
            if bound is not None and (measured >= bound if self.at_least else measured <= bound):
                return f"{name} met"
        return "missed"

    @property
    def at_least(self) -> bool:
        return self.metric in ("speed-up", "of the copy")


def _chunk(H: int, T: int = 8192) -> Problem:
    return Problem("chunk", 1, T, H)


def _step(B: int, state: str = "fp32") -> Problem:
    return Problem("step", B, 1, 32, state=state)


TARGETS = (
    Target(_chunk(96), "speed-up", 2.5, None),
    Target(_chunk(96), "ms", 1.3, 0.85),
    Target(_chunk(64), "speed-up", 2.5, None),
    Target(_chunk(64), "ms", 0.9, 0.6),
    Target(_chunk(32), "speed-up", 2.0, None),
    Target(_chunk(32), "ms", 0.55, 0.30),
    Target(_chunk(16), "speed-up", 2.0, None),
    Target(_chunk(16), "ms", 0.45, 0.20),
    *(Target(_chunk(16, T), "speed-up", 3.0, 5.0) for T in (64, 256, 1024)),
    Target(Problem("train", 8, 4096, 16), "speed-up", 1.6, 2.2),
    Target(Problem("train", 8, 4096, 16), "ms", None, 4.6),
    *(Target(_step(B), "of the copy", 0.85, 0.92) for B in (64, 512)),
    *(Target(_step(B), "speed-up", 1.5, None) for B in (64, 512)),
    *(Target(_step(B, "bf16"), "of the copy", 0.80, 0.88) for B in (64, 512)),
    Target(_step(1), "us, graph", 4.5, 3.0),
    *(Target(Problem("step_layer", B, 1, 32), "speed-up", 1.3, None) for B in (1, 8)),
)


@dataclass(frozen=True)
class Inputs:
    """Tensors of the operator; of step and step_layer without the T axis."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    b: Tensor
    w: Tensor
    state: Tensor
    cu_seqlens: Tensor | None

    @property
    def six(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v, self.g, self.b, self.w


def inputs(problem: Problem, device: torch.device, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """Random data on the device: keys and queries of length 1, gates of sigmoids, decays as `problem.gates` says.

    weak: g in (-0.004, 0].  trained: a layer's initial decay, -rate softplus(x + bias) with rates 1 to 16 a head and
    steps of 1e-3 to 0.1.  strong: g in [-5, -1].
    """
    random = torch.Generator(device).manual_seed(seed)
    keys, values = (problem.B, problem.T, problem.H, problem.K), (problem.B, problem.T, problem.H, problem.V)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=random, device=device)

    q, k = (torch.nn.functional.normalize(normal(*keys), dim=-1).to(dtype) for _ in range(2))
    b, w, v = normal(*keys).sigmoid().to(dtype), normal(*values).sigmoid().to(dtype), normal(*values).to(dtype)
    if problem.gates == "weak":
        g = -0.004 * uniform(*keys)
    elif problem.gates == "strong":
        g = -1 - 4 * uniform(*keys)
    else:
        steps = torch.exp(math.log(1e-3) + uniform(problem.H, problem.K) * math.log(100.0))
        bias = steps + torch.log(-torch.expm1(-steps))
        g = -(1 + 15 * uniform(problem.H, 1)) * torch.nn.functional.softplus(normal(*keys) + bias)
    state = normal(problem.sequences, problem.H, problem.K, problem.V)
    six = [x if problem.op in ("chunk", "train") else x[:, 0] for x in (q, k, v, g, b, w)]
    bounds = None
    if problem.packed:
        bounds = torch.tensor((0, *problem.packed), device=device).cumsum(0)
    return Inputs(*six, state.bfloat16() if problem.state == "bf16" else state, bounds)
