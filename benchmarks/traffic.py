"""Bytes that kernels load and store, counted in Triton's interpreter: `python -m benchmarks.traffic` prints JSON.

Run with TRITON_INTERPRET=1, in a process of its own. Heads of 128, decay and state in float32, inputs in bfloat16: the
interpreter rounds it wrongly, the addresses are right. The peer, which moves the same in both, has float16.

The bytes for a token and head are the difference between six chunks of 64 tokens and three, whole groups that share a
kept state in our backward pass, so that what is read once for a sequence is not in them; those of a step are for one
row and head, its state included.

issued: every load and store of every program: what passes through the second level cache.
memory: every address once for each kernel and direction: what has to come from memory and go there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from benchmarks import fla_peer

K = V = 128
CHUNK = 64


@dataclass
class Traffic:
    """Of the launches of one kernel; bytes."""

    issued: int = 0
    memory: int = 0
    launches: int = 0
    _touched: dict[str, list[np.ndarray]] = field(default_factory=lambda: {"loads": [], "stores": []})

    def touch(self, way: str, addresses: np.ndarray, size: int) -> None:
        self.issued += addresses.size * size
        self._touched[way].append((addresses // size).astype(np.uint64) * np.uint64(16) + np.uint64(size))

    def finish(self) -> None:
        """Counts the addresses of a launch once."""
        for chunks in self._touched.values():
            if chunks:
                self.memory += int((np.unique(np.concatenate(chunks)) % np.uint64(16)).sum())
            chunks.clear()
        self.launches += 1


@contextlib.contextmanager
def counted() -> Iterator[dict[str, Traffic]]:
    """Traffic by the name of the kernel, of the launches inside the block."""
    from triton.runtime.interpreter import GridExecutor, interpreter_builder

    builder, found = type(interpreter_builder), {}
    load, store, launch = builder.create_masked_load, builder.create_masked_store, GridExecutor.__call__
    running: list[Traffic] = []

    def counted_load(self, ptrs, mask, *rest):
        running[-1].touch("loads", ptrs.data[mask.data != 0], ptrs.get_element_ty().primitive_bitwidth // 8)
        return load(self, ptrs, mask, *rest)

    def counted_store(self, ptrs, value, mask, *rest):
        running[-1].touch("stores", ptrs.data[mask.data != 0], ptrs.get_element_ty().primitive_bitwidth // 8)
        return store(self, ptrs, value, mask, *rest)

    def counted_launch(self, *arguments, **keywords):
        running.append(found.setdefault(self.fn.__name__, Traffic()))
        try:
            return launch(self, *arguments, **keywords)
        finally:
            running.pop().finish()

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    GridExecutor.__call__ = counted_launch
    try:
        yield found
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        GridExecutor.__call__ = launch


def problem(T: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k, v, g, b, w of one head and T tokens, and its state."""
    torch.manual_seed(0)
    q, k, b = (torch.rand(1, T, 1, K).to(dtype) for _ in range(3))
    v, w = (torch.rand(1, T, 1, V).to(dtype) for _ in range(2))
    k = torch.nn.functional.normalize(k.float(), dim=-1).to(dtype)
    return [q, k, v, -0.1 * torch.rand(1, T, 1, K), b, w], torch.zeros(1, 1, K, V)


def for_a_token(call: Callable, dtype: torch.dtype = torch.bfloat16) -> dict[str, dict[str, float]]:
    """kernel -> issued and memory, for a token and head. call: of the six tensors and the state."""
    counts = []
    for chunks in (3, 6):
        six, state = problem(chunks * CHUNK, dtype)
        with counted() as found:
            call(*six, state)
        counts.append(found)
    fewer, more = counts
    return {
        name: {
            way: (getattr(more[name], way) - getattr(fewer[name], way)) / (3 * CHUNK) for way in ("issued", "memory")
        }
        for name in more
    }


def for_a_step(call: Callable, dtype: torch.dtype = torch.bfloat16) -> dict[str, dict[str, float]]:
    """kernel -> issued and memory, for a row and head. call: of six tensors of one token and the state."""
    six, state = problem(1, dtype)
    with counted() as found:
        call(*(x[:, 0] for x in six), state)
    return {name: {"issued": one.issued, "memory": one.memory} for name, one in found.items()}


def ours() -> dict[str, dict]:
    """what -> kernel -> bytes."""
    from gdn2_ops.kernels import chunk_backward, chunk_forward, step

    return {
        "forward": for_a_token(lambda *x: chunk_forward.chunk(*x, None, 1.0)),
        "backward": for_a_token(
            lambda *x: chunk_backward.chunk_backward(torch.ones_like(x[2]), torch.ones_like(x[6]), *x, None, 1.0)
        ),
        "step": for_a_step(lambda *x: step.step_inplace(*x, None, 1.0)),
        "step, bf16 state": for_a_step(lambda *x: step.step_inplace(*x[:6], x[6].bfloat16(), None, 1.0)),
    }


def peers() -> dict[str, dict]:
    """The same of fla-core with its first tiles."""
    fla_peer.make_interpretable()
    return {
        "forward": for_a_token(lambda *x: fla_peer.chunk(*x, 1.0, safe_gate=True), torch.float16),
        "forward and backward": for_a_token(_train_peer, torch.float16),
        "step": for_a_step(lambda *x: fla_peer.step_inplace(*x, 1.0), torch.float16),
    }


def _train_peer(*inputs: torch.Tensor) -> None:
    leaves = [x.requires_grad_() for x in inputs]
    outputs = fla_peer.chunk(*leaves, 1.0, safe_gate=True)
    torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs])


def main() -> None:
    parser = argparse.ArgumentParser(description="bytes loaded and stored, as JSON")
    parser.add_argument("--peer", action="store_true", help="fla-core too")
    options = parser.parse_args()
    if options.peer and fla_peer.missing():
        raise ImportError(f"benchmarks.traffic: fla-core is {fla_peer.missing()}")
    print(json.dumps({"gdn2_ops": ours()} | ({"fla-core": peers()} if options.peer else {})))


if __name__ == "__main__":
    main()
