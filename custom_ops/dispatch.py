"""Device -> kernel. Every kernel is reached through its check, so that no kernel sees a wrong shape.

The CPU runs the chunkwise form of the specification in PyTorch, in short chunks: the pairwise decays of a chunk are
[C, C, K] and want to stay in cache.
"""

from __future__ import annotations

from gdn2_ops import reference
from gdn2_ops.custom_ops import contract

CPU_CHUNK_SIZE = 16  # of 8, 16, 32, 64 the fastest, forward and backward, at T 2048 H 4 K 128 and at T 256 H 4 K 32


def _chunk(q, k, v, g, b, w, state, cu_seqlens, scale):
    contract.check_chunk(q, k, v, g, b, w, state, cu_seqlens)
    contract.check_cu_seqlens_values(cu_seqlens, q.shape[1])
    return reference.chunkwise(q, k, v, g, b, w, state, cu_seqlens=cu_seqlens, scale=scale, chunk_size=CPU_CHUNK_SIZE)


def _chunk_backward(do, dfinal_state, q, k, v, g, b, w, state, cu_seqlens, scale):
    contract.check_chunk_backward(do, dfinal_state, q, k, v, g, b, w, state, cu_seqlens)
    contract.check_cu_seqlens_values(cu_seqlens, q.shape[1])
    return reference.chunkwise_backward(
        do, dfinal_state, q, k, v, g, b, w, state, cu_seqlens=cu_seqlens, scale=scale, chunk_size=CPU_CHUNK_SIZE
    )


def _step(q, k, v, g, b, w, state, scale):
    contract.check_step(q, k, v, g, b, w, state)
    return reference.step(q, k, v, g, b, w, state, scale=scale)


def _step_inplace(q, k, v, g, b, w, state, slots, scale):
    contract.check_step_inplace(q, k, v, g, b, w, state, slots)
    contract.check_slots_values(slots, state.shape[0])
    rows = slice(None) if slots is None else slots.long()
    o, state[rows] = reference.step(q, k, v, g, b, w, state[rows], scale=scale)
    return o


KERNELS = {"chunk": _chunk, "chunk_backward": _chunk_backward, "step": _step, "step_inplace": _step_inplace}


def _no_cuda_kernel(op: str):
    def refuse(*args, **kwargs):
        raise NotImplementedError(
            f"gdn2::{op}: expected tensors on cpu, got cuda, for which there is no kernel yet; "
            "gdn2_ops.reference runs on any device"
        )

    return refuse


for _name, _kernel in KERNELS.items():
    contract.LIB.impl(_name, _kernel, "CPU")
    contract.LIB.impl(_name, _no_cuda_kernel(_name), "CUDA")
