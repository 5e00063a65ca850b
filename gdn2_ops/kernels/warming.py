"""Compiling and loading before the first request."""

from __future__ import annotations

from functools import partial

import torch

from gdn2_ops.kernels import chunk_backward, chunk_forward, segments, step
from gdn2_ops.kernels.step_layer import LayerToken, LayerWeights, step_layer


def warm_up(
    device: torch.device | str, dtype: torch.dtype, K: int, V: int, parts: tuple[str, ...] = ("chunk", "step")
) -> None:
    """Compiles and loads what a first request would wait for: call it for every layer shape of a model.

    Runs the launchers once, on one token, in every way of calling them: with and without a state, packed sequences and
    slots, the state of a step in float32 and in bfloat16. The sizes of a call other than K and V select no kernel, so
    no later call of that dtype compiles. Tensors whose memory starts at no multiple of 16 bytes do: Triton compiles
    narrower loads for them.

    Args:
        dtype: of q. K, V: channels of a key and of a value head. parts: chunk (prefill), step (decoding), backward
            (the gradients of chunk), step_layer (a token of a layer with a convolution of 4 tokens and a silu gate, for
            which cubins are built; call one of another kind once).

    Raises: ValueError: another part.
    """
    known = {"chunk": _chunk, "step": _step, "backward": _backward, "step_layer": _step_layer}
    if set(parts) - set(known):
        raise ValueError(f"gdn2_ops.kernels.warm_up: expected parts among {tuple(known)}, got {parts}")
    for part in parts:
        k, v = torch.zeros(1, 1, K, dtype=dtype, device=device), torch.zeros(1, 1, V, dtype=dtype, device=device)
        known[part]((k, k, v, k.float(), k, v), torch.zeros(1, 1, K, V, device=device))


def _step(token: tuple[torch.Tensor, ...], state: torch.Tensor) -> None:
    q, k, v, g, b, w = token
    slots = torch.zeros(1, dtype=torch.int64, device=state.device)
    for kept in (state, state.bfloat16()):
        for index in (None, slots, slots.int()):
            step.step_inplace(q, k, v, g, b, w, kept, index, 1.0)


def _chunk(token: tuple[torch.Tensor, ...], state: torch.Tensor) -> None:
    q, k, v, g, b, w = (x[:, None] for x in token)
    bounds = torch.tensor((0, 1), device=state.device)
    for before in (None, state):
        for packed in (None, bounds, bounds.int()):
            chunk_forward.chunk(q, k, v, g, b, w, before, packed, 1.0)
            _segments(q, k, v, g, b, w, before, packed)


def _backward(token: tuple[torch.Tensor, ...], state: torch.Tensor) -> None:
    q, k, v, g, b, w = (x[:, None] for x in token)
    bounds = torch.tensor((0, 1), device=state.device)
    for before in (None, state):
        for packed in (None, bounds, bounds.int()):
            _segments(q, k, v, g, b, w, before, packed)
            for dstate in (None, state):
                chunk_backward.chunk_backward(v, dstate, q, k, v, g, b, w, before, packed, 1.0)


def _segments(q, k, v, g, b, w, before: torch.Tensor | None, packed: torch.Tensor | None) -> None:
    """What few heads and a long T launch besides."""
    prepared = chunk_forward.prepare(q, k, g, b, packed, 1.0)
    segments.starts(prepared, v, w, before, packed, 1, 1, k.shape[-1])


def _step_layer(token: tuple[torch.Tensor, ...], state: torch.Tensor) -> None:
    (K, V), zeros = state.shape[2:], partial(torch.zeros, dtype=token[0].dtype, device=state.device)
    of_layer = LayerToken(zeros(1, 2 * K + V), zeros(1, K), zeros(1, K), zeros(1, V), zeros(1, V))
    weights, slots = LayerWeights(zeros(2 * K + V, 4), zeros(1), zeros(K), zeros(V)), zeros(1, dtype=torch.int64)
    for index in (None, slots, slots.int()):
        step_layer(of_layer, weights, zeros(1, 2 * K + V, 3), state, slots=index)
