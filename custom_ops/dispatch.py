"""Device -> kernel. The CPU kernels are custom_ops/native, registered by the native library when it is loaded; the CUDA
kernels are gdn2_ops/kernels, imported by the first call that needs them."""

from __future__ import annotations

import torch

from gdn2_ops.custom_ops import contract


def _chunk(q, k, v, g, b, w, state, cu_seqlens, scale):
    from gdn2_ops.kernels import chunk_forward

    contract.check_chunk(q, k, v, g, b, w, state, cu_seqlens)
    return chunk_forward.chunk(q, k, v, g, b, w, state, cu_seqlens, scale)


def _chunk_backward(do, dfinal_state, q, k, v, g, b, w, state, cu_seqlens, scale):
    from gdn2_ops.kernels import chunk_backward

    contract.check_chunk_backward(do, dfinal_state, q, k, v, g, b, w, state, cu_seqlens)
    return chunk_backward.chunk_backward(do, dfinal_state, q, k, v, g, b, w, state, cu_seqlens, scale)


def _step(q, k, v, g, b, w, state, scale):
    from gdn2_ops.kernels import step

    if state.dtype != torch.float32:  # the launcher takes bfloat16 too
        contract.check_step(q, k, v, g, b, w, state)
    return step.step(q, k, v, g, b, w, state, scale)


def _step_inplace(q, k, v, g, b, w, state, slots, scale):
    from gdn2_ops.kernels import step

    if state.dtype != torch.float32:
        contract.check_step_inplace(q, k, v, g, b, w, state, slots)
    return step.step_inplace(q, k, v, g, b, w, state, slots, scale)


CUDA = {
    "chunk": _chunk,
    "chunk_backward": _chunk_backward,
    "step": _step,
    "step_inplace": _step_inplace,
}
for _name in contract.SCHEMAS:
    contract.LIB.impl(_name, CUDA[_name], "CUDA")
