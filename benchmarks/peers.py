"""Who is measured: this library, and the other implementations that are written in PyTorch.

A peer is a class: `name`, `gates` (which operator it computes), `ops` (which of step, chunk, backward it has),
`missing()` (why it cannot run here, or None), a constructor from a problem, its inputs and a number of threads,
`result()` from the untouched inputs, and the timed call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

import gdn2_ops
from benchmarks.problems import Inputs, Problem
from gdn2_ops import reference

GDN2 = "GDN-2"
PIECE = 64  # tokens of one compiled piece: a whole sequence unrolled does not compile in minutes


class Peer(Protocol):
    name: str
    gates: str
    ops: tuple[str, ...]

    @staticmethod
    def missing() -> str | None: ...

    def __init__(self, problem: Problem, x: Inputs, threads: int) -> None: ...

    def result(self) -> tuple[Tensor, ...]: ...

    def __call__(self) -> object: ...


class InTorch:
    """Forward peers call `self.forward`; backward peers differentiate its o through a graph made once."""

    gates = GDN2
    ops: tuple[str, ...] = ("step", "chunk", "backward")
    forward: Callable[..., tuple[Tensor, Tensor]]

    @staticmethod
    def missing() -> str | None:
        return None

    def __init__(self, problem: Problem, x: Inputs, threads: int) -> None:
        self.backward = problem.op == "backward"
        self.args = x.token() if problem.op == "step" else x.tensors()
        if self.backward:
            self.leaves = [t.clone().requires_grad_() for t in self.args]
            self.do = x.do
            self.o = self.forward(*self.leaves)[0]

    def __call__(self) -> tuple[Tensor, ...]:
        if self.backward:
            return torch.autograd.grad(self.o, self.leaves, self.do, retain_graph=True)
        return self.forward(*self.args)

    def result(self) -> tuple[Tensor, ...]:
        return _with_time_axis(tuple(self()))


class Library(InTorch):
    """The public functions; step_inplace for a step."""

    name = "gdn2_ops"

    def __init__(self, problem: Problem, x: Inputs, threads: int) -> None:
        super().__init__(problem, x, threads)
        if problem.op == "step":
            *self.token, state = self.args
            self.state = state.clone()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        return gdn2_ops.chunk(*tensors)

    def __call__(self) -> tuple[Tensor, ...]:
        if hasattr(self, "state"):
            return self.step(), self.state
        return super().__call__()

    def step(self) -> Tensor:
        return gdn2_ops.step_inplace(*self.token, self.state)


class Operator(Library):
    """torch.ops.gdn2.step_inplace, what a compiled program calls: no checks in Python."""

    name = "gdn2_ops, operator"
    ops = ("step",)

    def step(self) -> Tensor:
        return torch.ops.gdn2.step_inplace(*self.token, self.state, None, self.token[0].shape[-1] ** -0.5)


class Forward(InTorch):
    """The forward next to its backward, so that their ratio comes from one run."""

    name = "gdn2_ops, its forward"
    ops = ("backward",)

    def __init__(self, problem: Problem, x: Inputs, threads: int) -> None:
        self.args = x.tensors()
        self.backward = False
        self.problem, self.x = problem, x

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        return gdn2_ops.chunk(*tensors)

    def result(self) -> tuple[Tensor, ...]:
        return Library(self.problem, self.x, 0).result()  # checked by the gradients of its graph


class NaiveLoop(InTorch):
    """Token by token in eager PyTorch, as public reference code writes it (einsum: faster than products and sums)."""

    name = "naive PyTorch loop"
    ops = ("step", "chunk")  # its backward takes gigabytes, and the peers after it pay for them

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        q, k, v, g, b, w = (x.unsqueeze(1) if x.dim() == 3 else x for x in (q, k, v, g, b, w))
        scale, outs = q.shape[-1] ** -0.5, []
        for q_t, k_t, v_t, g_t, b_t, w_t in zip(*(x.unbind(1) for x in (q, k, v, g, b, w))):
            state = g_t.exp()[..., None] * state
            erased_BHV = torch.einsum("bhkv,bhk->bhv", state, b_t * k_t)
            state = state + torch.einsum("bhk,bhv->bhkv", k_t, w_t * v_t - erased_BHV)
            outs.append(torch.einsum("bhkv,bhk->bhv", state, scale * q_t))
        return torch.stack(outs, 1), state


class CompiledReference(InTorch):
    """torch.compile of gdn2_ops.reference: `step`, and `chunkwise` in pieces of 64 tokens, one after another."""

    name = "torch.compile(reference)"
    backend = "inductor"

    def __init__(self, problem: Problem, x: Inputs, threads: int) -> None:
        function = reference.step if problem.op == "step" else reference.chunkwise
        self.compiled = torch.compile(function, backend=self.backend, dynamic=False, fullgraph=True)
        super().__init__(problem, x, threads)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        *rows, state = tensors
        if rows[0].dim() == 3:
            return self.compiled(*rows, state)
        outs = []
        for piece in zip(*(x.split(PIECE, 1) for x in rows)):
            o, state = self.compiled(*(x.contiguous() for x in piece), state)
            outs.append(o)
        return torch.cat(outs, 1), state


def _with_time_axis(result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    o, *rest = result
    return (o.unsqueeze(1) if o.dim() == 3 else o, *rest)
