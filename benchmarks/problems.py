"""What is measured: fixed shapes, their inputs, the float64 answer, and GDN-2 written for gated delta rules."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gdn2_ops import reference

NAMES = ("q", "k", "v", "g", "b", "w", "state")
VECTOR_OPS = 4  # a state element and token: a*S, + k u^T, and the two sums S^T (a*b*k), S^T (a*q)


@dataclass(frozen=True)
class Problem:
    """op: step (T = 1, the state in place), chunk, or backward (of chunk, from the gradient of o). All float32."""

    op: str
    N: int
    T: int
    H: int
    K: int = 128
    V: int = 128

    def __str__(self) -> str:
        return f"{self.op} N={self.N} H={self.H}" if self.op == "step" else f"{self.op} T={self.T} H={self.H}"

    @property
    def state_bytes(self) -> int:
        return self.N * self.H * self.K * self.V * 4

    @property
    def multiply_adds(self) -> int:
        """Vector operations of the recurrence token by token, in elements."""
        return VECTOR_OPS * self.N * self.T * self.H * self.K * self.V


PROBLEMS = (
    Problem("step", 1, 1, 4),
    Problem("step", 1, 1, 32),
    Problem("step", 64, 1, 32),  # 134 MB of states: beyond the caches
    Problem("chunk", 1, 64, 4),
    Problem("chunk", 1, 512, 4),
    Problem("chunk", 1, 2048, 4),
    Problem("chunk", 1, 512, 32),
    Problem("backward", 1, 2048, 4),
)


@dataclass
class Inputs:
    """q k g b [N, T, H, K], v w do [N, T, H, V], state [N, H, K, V], float32. do only for a backward."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    b: Tensor
    w: Tensor
    state: Tensor
    do: Tensor | None = field(default=None)

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in NAMES)

    def token(self) -> tuple[Tensor, ...]:
        """The six inputs of the only token, and the state."""
        *rows, state = self.tensors()
        return *(x.squeeze(1) for x in rows), state


def inputs(problem: Problem, seed: int = 0) -> Inputs:
    """Unit keys, gates as of a trained layer: half-lives of 3 to 700 tokens, erase and write gates around 1/2."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (problem.N, problem.T, problem.H, problem.K), (problem.N, problem.T, problem.H, problem.V)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator)

    q, k = (torch.nn.functional.normalize(normal(keys), dim=-1) for _ in range(2))
    g = -torch.exp(torch.empty(keys).uniform_(-7, -1.5, generator=generator))
    state = 0.1 * normal((problem.N, problem.H, problem.K, problem.V))
    do = normal(values) if problem.op == "backward" else None
    return Inputs(q, k, normal(values), g, normal(keys).sigmoid(), normal(values).sigmoid(), state, do)


def answer(problem: Problem, x: Inputs) -> tuple[Tensor, ...]:
    """In float64 from the specification: o and the final state, or the gradients in the order of NAMES."""
    parts = []
    for rows in zip(*(t.split(8) for t in (*x.tensors(), *([] if x.do is None else [x.do])))):  # bounds the memory
        doubles = [t.double() for t in rows]
        if problem.op == "backward":
            parts.append(reference.chunkwise_backward(doubles[-1], None, *doubles[:-1]))
        else:
            parts.append(reference.recurrent(*doubles))
    return tuple(torch.cat(tensors) for tensors in zip(*parts))


def error(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float:
    """The largest deviation of any tensor, in units of that tensor's largest entry. inf where shapes or values fail."""
    worst = 0.0
    for a, b in zip(got, wanted, strict=True):
        if a.shape != b.shape or not a.isfinite().all():
            return float("inf")
        worst = max(worst, ((a.double() - b).abs().max() / b.abs().max()).item())
    return worst


@dataclass
class Coordinates:
    """GDN-2 as a plain gated delta rule with beta = 1, exact where b > 0 (docs/derivation.md).

    With R_t = Diag(b_t)^1/2 S_t:  R_t = (I - k' k'^T) Diag(exp g') R_{t-1} + k' v'^T,  o_t = scale R_t^T q'.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    last_b: Tensor

    @classmethod
    def of(cls, x: Inputs) -> Coordinates:
        b = x.b.clamp_min(1e-12)
        root, log_b = b.sqrt(), b.log()
        before = torch.cat((torch.zeros_like(log_b[:, :1]), log_b[:, :-1]), 1)
        g = x.g + (log_b - before) / 2
        return cls(x.q / root, x.k * root, x.w * x.v, g, b[:, -1])

    def state(self, final: Tensor) -> Tensor:
        """The state [N, H, K, V] of GDN-2 from the final R."""
        return final / self.last_b.sqrt()[..., None]
