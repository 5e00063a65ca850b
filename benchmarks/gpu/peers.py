"""Who is timed: this library, fla-core in both its gate modes, and for a whole layer what a compiler makes of it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import fla_peer
from benchmarks.gpu.plan import Inputs, Problem
from gdn2_ops import reference

OURS = "gdn2_ops"


class Contender:
    """name, ops: what it can run. checked: whether it computes all of the problem, so that its error can be told. A
    subclass has `prepare`, which gives the timed call; its result is the outputs."""

    name = ""
    ops: tuple[str, ...] = ()
    checked = True

    @staticmethod
    def missing() -> str | None:
        return None

    def prepare(self, problem: Problem, x: Inputs) -> Callable[[], tuple[Tensor, ...]]:
        raise NotImplementedError


class Ours(Contender):
    name, ops = OURS, ("chunk", "train", "step")

    def prepare(self, problem: Problem, x: Inputs) -> Callable[[], tuple[Tensor, ...]]:
        scale = problem.K**-0.5
        if problem.op == "train":
            return _trained(lambda *leaves: torch.ops.gdn2.chunk(*leaves, x.cu_seqlens, scale), x)
        if problem.op == "chunk":
            return lambda: torch.ops.gdn2.chunk(*x.six, x.state, x.cu_seqlens, scale)
        if problem.state == "bf16":
            from gdn2_ops.kernels import step

            return lambda: (step.step_inplace(*x.six, x.state, None, scale),)
        return lambda: (torch.ops.gdn2.step_inplace(*x.six, x.state, None, scale),)


class Fla(Contender):
    name, ops = "fla-core, safe_gate", ("chunk", "train")
    safe_gate = True
    missing = staticmethod(fla_peer.missing)

    def prepare(self, problem: Problem, x: Inputs) -> Callable[[], tuple[Tensor, ...]]:
        def chunk(*seven: Tensor) -> tuple[Tensor, ...]:
            return fla_peer.chunk(*seven, problem.K**-0.5, safe_gate=self.safe_gate, cu_seqlens=x.cu_seqlens)

        return _trained(chunk, x) if problem.op == "train" else lambda: chunk(*x.six, x.state)


class FlaDefault(Fla):
    name, ops = "fla-core", ("chunk", "train")
    safe_gate = False


class FlaStep(Contender):
    name, ops = "fla-core", ("step",)
    missing = staticmethod(fla_peer.missing)

    def prepare(self, problem: Problem, x: Inputs) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: (fla_peer.step_inplace(*x.six, x.state, problem.K**-0.5),)


class FusedLayer(Contender):
    """`step_layer`: one kernel between the projections of a layer."""

    name, ops = OURS, ("step_layer",)

    def prepare(self, problem: Problem, x: Inputs) -> Callable[[], tuple[Tensor, ...]]:
        from gdn2_ops.kernels.step_layer import LayerToken, LayerWeights, step_layer

        parts = layer_parts(problem, x)
        token, weights = LayerToken(*parts[:5]), LayerWeights(*parts[5:9])
        return lambda: (step_layer(token, weights, parts[9], x.state),)


class BareStep(Contender):
    """Only the recurrence of the layer, on tensors that others would have to prepare."""

    name, ops = f"{OURS}, bare step", ("step_layer",)
    checked = False

    def prepare(self, problem: Problem, x: Inputs) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: (torch.ops.gdn2.step_inplace(*x.six, x.state, None, problem.K**-0.5),)


class CompiledLayer(Contender):
    """The same layer in PyTorch around the bare step, by torch.compile: three or four kernels."""

    name, ops = "torch.compile around the step", ("step_layer",)
    backend = "inductor"

    def prepare(self, problem: Problem, x: Inputs) -> Callable[[], tuple[Tensor, ...]]:
        parts = layer_parts(problem, x)
        compiled = torch.compile(unfused_layer, fullgraph=True, backend=self.backend)
        return lambda: (compiled(problem.H, parts, x.state),)


CONTENDERS: tuple[type[Contender], ...] = (Ours, Fla, FlaDefault, FlaStep, FusedLayer, BareStep, CompiledLayer)


def layer_parts(problem: Problem, x: Inputs) -> list[Tensor]:
    """qkv, f, b, w, z of a token; convolution, A_log, dt_bias, norm of a layer; its window."""
    random = torch.Generator(x.q.device).manual_seed(1)
    H, K, V = problem.H, problem.K, problem.V
    shapes = [(problem.B, 2 * H * K + H * V), *((problem.B, H * size) for size in (K, K, V, V))]
    shapes += [(shapes[0][1], 4), (H,), (H * K,), (V,), (problem.B, shapes[0][1], 3)]
    made = (torch.randn(shape, generator=random, device=x.q.device) for shape in shapes)
    return [y.bfloat16().to(x.q.dtype) for y in made]  # the same numbers in every dtype


def _step_inplace(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor, state: Tensor) -> Tensor:
    return torch.ops.gdn2.step_inplace(q, k, v, g, b, w, state, None, k.shape[-1] ** -0.5)


def _exact_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor, state: Tensor) -> Tensor:
    o, after = reference.step(q, k, v, g, b, w, state)
    state.copy_(after)
    return o


def unfused_layer(
    H: int, parts: list[Tensor], state: Tensor, wide: torch.dtype = torch.float32, step: Callable = _step_inplace
) -> Tensor:
    """`step_layer` in PyTorch and one step; window and state are overwritten. wide: what is summed in."""
    qkv, f, b, w, z, convolution, A_log, dt_bias, norm, window = parts
    K = f.shape[1] // H
    seen = torch.cat((window, qkv[:, :, None]), 2)
    mixed = F.silu((seen.to(wide) * convolution.to(wide)).sum(2)).to(qkv.dtype)
    q, k, v = (x.unflatten(-1, (H, -1)) for x in mixed.split((H * K, H * K, w.shape[1]), -1))
    q, k = (F.normalize(x.to(wide), dim=-1).to(x.dtype) for x in (q, k))
    g = -A_log.to(wide).exp()[:, None] * F.softplus(f.to(wide) + dt_bias.to(wide)).unflatten(-1, (H, K))
    gates = b.sigmoid().unflatten(-1, (H, K)), w.sigmoid().unflatten(-1, (H, -1))
    o = step(q, k, v, g, *gates, state).to(wide)
    window.copy_(seen[:, :, 1:])
    normed = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-5) * norm.to(wide)
    return (normed * F.silu(z.to(wide)).view_as(normed)).to(qkv.dtype).flatten(1)


def _trained(chunk: Callable[..., tuple[Tensor, ...]], x: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward: outputs and the gradients of all inputs, for a gradient of ones."""
    leaves = [y.detach().requires_grad_() for y in (*x.six, x.state)]

    def call() -> tuple[Tensor, ...]:
        outputs = chunk(*leaves)
        grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])
        return *outputs, *grads

    return call


HEADS = 2  # of the first row of the batch: what the float64 reference computes


def expected(problem: Problem, x: Inputs) -> tuple[Tensor, ...]:
    """What `sliced` outputs of a right contender are, in float64."""
    if problem.op == "step_layer":
        wide = Inputs(*(y.double() for y in (*x.six, x.state)), None)
        y = unfused_layer(problem.H, layer_parts(problem, wide), wide.state, torch.float64, _exact_step)
        return sliced(problem, (y,), wide.state)
    few = Inputs(
        *(_few(problem, y) for y in x.six), x.state[:, :HEADS] if problem.packed else x.state[:1, :HEADS], None
    )
    double = [y.double() for y in (*few.six, few.state)]
    scale = problem.K**-0.5
    if problem.op == "chunk":
        return reference.recurrent(*double, cu_seqlens=x.cu_seqlens, scale=scale)
    if problem.op == "train":
        o, state = reference.chunkwise(*double, scale=scale)
        grads = reference.chunkwise_backward(torch.ones_like(o), torch.ones_like(state), *double, scale=scale)
        return o, state, *grads
    return reference.step(*double, scale=scale)


def sliced(problem: Problem, outputs: tuple[Tensor, ...], state: Tensor) -> tuple[Tensor, ...]:
    """The part of the outputs that `expected` has."""
    everything = outputs if problem.op in ("chunk", "train") else (*outputs, state)
    is_state = [False] * len(everything)
    for i in (1, -1) if problem.op == "train" else (-1,):
        is_state[i] = True
    rows = slice(None) if problem.packed else slice(1)
    return tuple(y[rows, :HEADS] if s else _few(problem, y) for y, s in zip(everything, is_state))


def _few(problem: Problem, x: Tensor) -> Tensor:
    if problem.op == "step_layer":  # outputs of all heads in one row
        return x[:1]
    return x[:1, :, :HEADS] if problem.op in ("chunk", "train") else x[:1, :HEADS]


def error(got: Iterable[Tensor], wanted: Iterable[Tensor]) -> float:
    """The largest |got - wanted| / |wanted| over the tensors, in norms."""
    return max(((y.double() - z).norm() / z.norm()).item() for y, z in zip(got, wanted))


def compile_ahead(problems: Iterable[Problem], deadline_s: float) -> list[str]:
    """Fills Triton's cache with every configuration that fla-core will try, a process for each number of heads, op and
    gate mode, all at once: one after another they take longer than a whole run. What is not ready in deadline_s is
    stopped. Returns what failed."""
    if fla_peer.missing():
        return []
    jobs = sorted({(p.op, p.H, safe) for p in problems if p.op in Fla.ops for safe in (0, 1)})
    command = [sys.executable, "-m", "benchmarks.gpu.peers"]
    running = [
        subprocess.Popen([*command, *map(str, job)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for job in jobs
    ]
    failed = []
    stop_at = time.monotonic() + deadline_s
    for job, process in zip(jobs, running):
        left = max(stop_at - time.monotonic(), 1)  # one that has ended needs a moment
        try:
            _, errors = process.communicate(timeout=left)
        except subprocess.TimeoutExpired:
            process.kill()
            errors = process.communicate()[1] or "out of time"
        if process.returncode:
            failed.append(f"{job}: {(errors.strip().splitlines() or ['?'])[-1]}")
    return failed


def _compile_one(op: str, H: int, safe_gate: bool) -> None:
    from triton.runtime.autotuner import Autotuner

    from benchmarks.gpu.plan import inputs

    if why := fla_peer.missing():
        raise ImportError(f"fla-core is {why}")
    bench = Autotuner._bench

    def once(self, *arguments, config, **meta):
        self.do_bench = lambda call, quantiles=None: (call(), [0.0, 0.0, 0.0])[1]
        return bench(self, *arguments, config=config, **meta)

    Autotuner._bench = once  # type: ignore[method-assign]
    small = Problem(op, 1, 128, H)
    peer = Fla() if safe_gate else FlaDefault()
    peer.prepare(small, inputs(small, torch.device("cuda")))()
    torch.cuda.synchronize()


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"
    _compile_one(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1")
