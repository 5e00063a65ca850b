"""The gradients of whole sequences: four kernels, nothing kept from the forward pass but its inputs.

`prepare`, `recur` (chunk_forward.py) again, with BACKWARD: the operands of every chunk, S before each group of chunks,
and R = A X. Then with dS the gradient of the state after the chunk, equations (9) and (10) of docs/derivation.md in
those operands:

    dX = Ax^T dO + Kx dS        dv = w*dX        dw = v*dX
    dS before the chunk = Diag(decay) dS + Qd^T dO - E^T dX

`recur_back`: one program per (sequence, value head, BV value channels), from the last chunk to the first, dS in
              registers. Writes dS after each group of chunks, dX and the gradient of the initial state.
`gradients` (gradients.py): one program per (group of chunks, key head), in parallel over all groups: the rest of (9)
              and (10), and (11)-(13). It adds over the value heads of the group itself: no atomics, the same bits
              every time. Last, where R and dX were, dv and dw.

Letters, slots and groups as in chunk_forward.py. Between the two: dstates like states [groups, HV, key_size,
value_size] and dX like R [B, T, HV, V], in q's dtype, rounded as operands of a tensor core are: float16 overflows where
dS does. R waits in the memory of dv, dX in that of dw, until a program of `gradients` has read all it needs of them.

dv and dw are products of a dX that has been rounded. In float16 `recur_back` multiplies by two halves of each number of
Ax, and of dX where it carries dS (decision 0005).

Memory over inputs and gradients, for sequences of more than 2,304 tokens (whole groups of chunks) and compiled head
sizes: less than one bfloat16 state of every chunk, which is 2 K V / C bytes for a token and value head. Of a walk that
is not in segments (segments.py) two states of a group, 2 e K V / (G C), e bytes a number: with heads of 128 341 in half
precision and 410 in float32, where the state of every chunk is 512 and the gradients are 1,792 and 3,072. A is freed
after `recur`, the rest of the workspace of `prepare` before dq, dk, dg and db are made, which take more; where they do
not (`is_prepared_twice`) `prepare` runs twice. Of shorter sequences the last chunk and group weigh more: float32, keys
of 32 and few heads need 2 % more than the state at 2,304 tokens. Sizes between the compiled ones pad the workspace:
heads of 33 need 83 bytes in bfloat16 and 286 in float32, where the state is 34.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn2_ops.kernels.chunk_forward import bounds, group, kept_groups, kept_states, recur_for_backward, segments_of_walk
from gdn2_ops.kernels.gradients import GRADIENTS
from gdn2_ops.kernels.kernel import Kernel, is_masked
from gdn2_ops.kernels.prepare import FOR_RECUR, FOR_RECUR_BACK, prepare, sequences, workspace_bytes
from gdn2_ops.kernels.products import loaded_product, triangle_product, triangle_size
from gdn2_ops.kernels.segments import starts_bytes


@triton.jit(do_not_specialize=["T", "H", "HV", "key_size", "value_size"])
def recur_back_kernel(
    # inputs
    e_ptr,
    qd_ptr,
    kx_ptr,
    ax_ptr,
    ax_rest_ptr,
    decay_ptr,
    do_ptr,
    dfinal_state_ptr,
    cu_seqlens_ptr,
    # sizes
    T,
    H,
    HV,
    key_size,
    value_size,
    # outputs
    dx_ptr,
    dstates_ptr,
    dstate_ptr,
    # constexprs
    K: tl.constexpr,
    V: tl.constexpr,
    STATE: tl.constexpr,
    PACKED: tl.constexpr,
    MASKED: tl.constexpr,
    C: tl.constexpr,
    BV: tl.constexpr,
):
    operand: tl.constexpr = e_ptr.dtype.element_ty
    G: tl.constexpr = group(operand.primitive_bitwidth)
    i_v = tl.program_id(0) % (V // BV)
    i_hv = tl.program_id(0) // (V // BV) % HV
    i_n = tl.program_id(0) // (V // BV * HV)
    first, tokens, first_slot = bounds(cu_seqlens_ptr, i_n, T, C, PACKED)
    _, _, first_group = bounds(cu_seqlens_ptr, i_n, T, G * C, PACKED)
    chunks = tl.cdiv(tokens, C)
    keys, values = key_size if MASKED else K, value_size if MASKED else V

    i_C, i_K, i_V = tl.arange(0, C), tl.arange(0, K), i_v * BV + tl.arange(0, BV)
    live_KV = (i_K < keys)[:, None] & (i_V < values)[None, :]
    at_KV = i_K[:, None] * values + i_V[None, :]
    at_state = (i_n.to(tl.int64) * HV + i_hv) * keys * values
    if STATE:
        dstate_KV = tl.load(dfinal_state_ptr + at_state + at_KV, mask=live_KV, other=0.0)
    else:
        dstate_KV = tl.zeros([K, BV], tl.float32)

    for done in tl.range(0, chunks):
        i_c = chunks - 1 - done
        slot = (first_slot + i_c).to(tl.int64)
        at_slot = slot * H + i_hv // (HV // H)
        row = i_c * C
        at_token = ((first + row) * HV + i_hv) * values
        at_CV = i_C[:, None] * (HV * values) + i_V[None, :]
        live_CV = (row + i_C < tokens)[:, None] & (i_V < values)[None, :]
        operand_KV = dstate_KV.to(operand)
        if (i_c % G == G - 1) | (done == 0):
            at_dstates = ((first_group + i_c // G).to(tl.int64) * HV + i_hv) * keys * values
            tl.store(dstates_ptr + at_dstates + at_KV, operand_KV, mask=live_KV)
        do_CV = tl.load(do_ptr + at_token + at_CV, mask=live_CV, other=0.0)
        dx_CV = triangle_product(ax_ptr + at_slot * triangle_size(C), do_CV, tl.zeros([C, BV], tl.float32), -1)
        if operand == tl.float16:
            dx_CV = triangle_product(ax_rest_ptr + at_slot * triangle_size(C), do_CV, dx_CV, -1)
        dx_CV = loaded_product(kx_ptr + at_slot * C * K, K, 1, operand_KV, dx_CV)
        stored_CV = dx_CV.to(operand)
        tl.store(dx_ptr + at_token + at_CV, stored_CV, mask=live_CV)

        dstate_KV *= tl.load(decay_ptr + at_slot * K + i_K)[:, None]
        dstate_KV = loaded_product(qd_ptr + at_slot * C * K, 1, K, do_CV, dstate_KV)
        dstate_KV = loaded_product(e_ptr + at_slot * C * K, 1, K, -stored_CV, dstate_KV)
        if operand == tl.float16:
            minus_rest_CV = (stored_CV.to(tl.float32) - dx_CV).to(operand)
            dstate_KV = loaded_product(e_ptr + at_slot * C * K, 1, K, minus_rest_CV, dstate_KV)
    tl.store(dstate_ptr + at_state + at_KV, dstate_KV, mask=live_KV)


def _described(name: str, masked: int) -> Kernel:
    types = dict.fromkeys(("e", "qd", "kx", "ax", "ax_rest"), "*q") | {"decay": "*fp32"}
    types |= {"do": "*q", "dfinal_state": "*fp32", "cu_seqlens": "*i64"}
    types |= dict.fromkeys(("T", "H", "HV", "key_size", "value_size"), "i32")
    return Kernel(
        name=name,
        function=recur_back_kernel,
        types=types | {"dx": "*q", "dstates": "*q", "dstate": "*fp32"},
        options={"STATE": (0, 1), "PACKED": (0, 1), "MASKED": (masked,)},
        grid="(N * HV * V / BV, 1, 1)",
    )


RECUR_BACK = (_described("recur_back", 0), _described("recur_back_masked", 1))  # by MASKED: other tiles
KERNELS = (GRADIENTS, *RECUR_BACK)


def is_prepared_twice(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Whether `prepare` runs twice, for `recur_back` and then for `recur`, and neither workspace waits for the other
    one's reader: where that takes less memory."""
    (H, key_size), (HV, V), N = q.shape[2:], v.shape[2:], sequences(q, cu_seqlens)
    recur, back = FOR_RECUR.value, FOR_RECUR_BACK.value
    of_both, of_recur, of_back = (workspace_bytes(q, cu_seqlens, readers) for readers in (recur + back, recur, back))
    values, dstate = v.nbytes, 4 * N * HV * key_size * V  # R, or dX
    states = v.dtype.itemsize * kept_groups(v, cu_seqlens) * HV * key_size * V  # S, or dS
    segments = segments_of_walk(v, cu_seqlens)
    walk = starts_bytes(N, segments, H, HV, key_size, V) if segments > 1 else 0
    gradients = 3 * q.nbytes + 4 * q.numel() + 2 * (values + states) + dstate
    once = max(of_both + values + states + walk, of_back + 2 * (values + states) + dstate)
    twice = max(of_back + values + states, of_recur + 2 * (values + states) + walk) + dstate
    return max(gradients, twice) < max(gradients, once)


def chunk_backward(
    do: Tensor,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`torch.ops.gdn2.chunk_backward` on a GPU. The values of cu_seqlens stay on the device and are not read here."""
    (_, T, H, key_size), (HV, value_size), N = q.shape, v.shape[2:], sequences(q, cu_seqlens)
    do, q, k, v, g, b, w = (x.contiguous() for x in (do, q, k, v, g, b, w))
    dfinal_state, cu_seqlens = (None if x is None else x.contiguous() for x in (dfinal_state, cu_seqlens))
    twice = is_prepared_twice(q, v, cu_seqlens)
    prepared = prepare(q, k, g, b, cu_seqlens, scale, backward=FOR_RECUR_BACK.value + (0 if twice else FOR_RECUR.value))
    if not twice:
        states, dv = recur_for_backward(prepared, v, w, state, cu_seqlens, key_size)  # R
    operands = (prepared.e, prepared.qd, prepared.kx, prepared.ax, prepared.ax_rest, prepared.decay)
    del prepared  # and A with it
    dw, dstates = torch.empty_like(w), kept_states(v, cu_seqlens, key_size)  # dX
    dstate = g.new_empty(N, HV, key_size, value_size)
    packed, masked = int(cu_seqlens is not None), is_masked(key_size, value_size)
    RECUR_BACK[masked].launch(
        lambda c: (N * HV * (c["V"] // c["BV"]),),
        v.device,
        v.dtype,
        key_size,
        value_size,
        *(*operands, do, dfinal_state, cu_seqlens, T, H, HV, key_size, value_size),
        *(dw, dstates, dstate),
        STATE=int(dfinal_state is not None),
        PACKED=packed,
        MASKED=masked,
    )
    del operands
    if twice:
        prepared = prepare(q, k, g, b, cu_seqlens, scale, backward=FOR_RECUR.value)
        states, dv = recur_for_backward(prepared, v, w, state, cu_seqlens, key_size)
        del prepared
    dq, dk, dg, db = (torch.empty_like(x) for x in (q, k, g, b))
    GRADIENTS.launch(
        (states.shape[0] * H,),
        q.device,
        q.dtype,
        key_size,
        value_size,
        *(q, k, g, b, v, w, do, states, dstates, cu_seqlens, T, H, HV, N, key_size, value_size, scale),
        *(dq, dk, dg, db, dv, dw),
        PACKED=packed,
        MASKED=masked,
    )
    return dq, dk, dv, dg, db, dw, dstate
