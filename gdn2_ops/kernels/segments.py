"""The walk over chunks in segments that run side by side: for few sequences x heads, whose walk leaves the GPU idle.

A chunk's state is linear in the one before it, S' = (Diag(decay) - Kx^T E) S + Kx^T Z, and so is a segment's:

    S_end = M S_begin + F        M: the walk from the identity with Z = 0        F: the walk from no state

`summarise`: one program per (sequence, segment, BV columns of F for each value head, then of M for each key head),
             serial over the chunks of its segment. Segments that nothing follows are left out.
`chain`:     one program per (sequence, value head, BV value channels), serial over segments: the state before each.
`recur` then starts every segment from its own state. Letters and the workspace: chunk_forward.py; tiles.segments says
when. float32 throughout:  m [N, segments, H, key_size, key_size]    f [N, segments, HV, key_size, value_size], in which
`chain` puts the state before a segment in the place of its F.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn2_ops.kernels.kernel import Kernel, is_masked
from gdn2_ops.kernels.prepare import Workspace, bounds, carried, minus_taken, sequences


@triton.jit(do_not_specialize=["T", "H", "HV", "segments", "length", "key_size", "value_size"])
def summarise_kernel(
    # inputs
    e_ptr,
    kx_ptr,
    decay_ptr,
    v_ptr,
    w_ptr,
    cu_seqlens_ptr,
    # sizes
    T,
    H,
    HV,
    segments,
    length,
    key_size,
    value_size,
    # outputs
    m_ptr,
    f_ptr,
    # constexprs
    K: tl.constexpr,
    V: tl.constexpr,
    PACKED: tl.constexpr,
    MASKED: tl.constexpr,
    C: tl.constexpr,
    BV: tl.constexpr,
):
    of_values, of_keys = HV * (V // BV), H * (K // BV)
    i_tile = tl.program_id(0) % (of_values + of_keys)
    i_run = tl.program_id(0) // (of_values + of_keys)  # of N * segments
    first, tokens, first_slot = bounds(cu_seqlens_ptr, i_run // segments, T, C, PACKED)
    begin = i_run % segments * length
    if begin + length >= tl.cdiv(tokens, C):
        return
    keys, values = key_size if MASKED else K, value_size if MASKED else V

    is_f = i_tile < of_values
    i_hv = tl.where(is_f, i_tile // (V // BV), 0)
    i_h = tl.where(is_f, i_hv // (HV // H), (i_tile - of_values) // (K // BV))
    columns = tl.where(is_f, values, keys)
    i_column = tl.where(is_f, i_tile % (V // BV), (i_tile - of_values) % (K // BV)) * BV + tl.arange(0, BV)
    i_C, i_K = tl.arange(0, C), tl.arange(0, K)
    state_KV = tl.where((i_K[:, None] == i_column[None, :]) & (i_tile >= of_values), 1.0, 0.0)
    for i_c in tl.range(begin, begin + length):
        at_slot = (first_slot + i_c).to(tl.int64) * H + i_h
        at_token = ((first + i_c * C) * HV + i_hv) * values
        at_CV = i_C[:, None] * (HV * values) + i_column[None, :]
        live_CV = (i_c * C + i_C < tokens)[:, None] & (i_column < values)[None, :] & is_f
        z_CV = tl.load(w_ptr + at_token + at_CV, mask=live_CV, other=0.0).to(tl.float32)
        z_CV *= tl.load(v_ptr + at_token + at_CV, mask=live_CV, other=0.0).to(tl.float32)
        x_CV = minus_taken(e_ptr, at_slot, z_CV, state_KV.to(e_ptr.dtype.element_ty), C, K)
        state_KV = carried(decay_ptr, kx_ptr, at_slot, x_CV, state_KV, C, K)

    live_KV = (i_K < keys)[:, None] & (i_column < columns)[None, :]
    at_KV = i_K[:, None] * columns + i_column[None, :]
    run = i_run.to(tl.int64)
    tl.store(f_ptr + (run * HV + i_hv) * keys * values + at_KV, state_KV, mask=live_KV & is_f)
    tl.store(m_ptr + (run * H + i_h) * keys * keys + at_KV, state_KV, mask=live_KV & (i_tile >= of_values))


@triton.jit(do_not_specialize=["T", "H", "HV", "segments", "length", "key_size", "value_size"])
def chain_kernel(
    # inputs
    m_ptr,
    state_ptr,
    cu_seqlens_ptr,
    # sizes
    T,
    H,
    HV,
    segments,
    length,
    key_size,
    value_size,
    # F; the state before each segment in the end
    f_ptr,
    # constexprs
    K: tl.constexpr,
    V: tl.constexpr,
    STATE: tl.constexpr,
    PACKED: tl.constexpr,
    MASKED: tl.constexpr,
    EXACT: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    i_v = tl.program_id(0) % (V // BV)
    i_hv = tl.program_id(0) // (V // BV) % HV
    i_n = tl.program_id(0) // (V // BV * HV)
    _, tokens, _ = bounds(cu_seqlens_ptr, i_n, T, C, PACKED)
    keys, values = key_size if MASKED else K, value_size if MASKED else V
    i_K, i_V = tl.arange(0, K), i_v * BV + tl.arange(0, BV)
    live_KV = (i_K < keys)[:, None] & (i_V < values)[None, :]
    at_KV = i_K[:, None] * values + i_V[None, :]
    at_head = (i_n.to(tl.int64) * HV + i_hv) * keys * values
    state_KV = tl.zeros([K, BV], tl.float32)
    if STATE:
        state_KV = tl.load(state_ptr + at_head + at_KV, mask=live_KV, other=0.0)

    used = tl.maximum(tl.cdiv(tl.cdiv(tokens, C), length), 1)
    for i_segment in tl.range(0, used):
        run = i_n.to(tl.int64) * segments + i_segment
        at_f = (run * HV + i_hv) * keys * values
        f_KV = tl.load(f_ptr + at_f + at_KV, mask=live_KV & (i_segment + 1 < used), other=0.0)
        tl.debug_barrier()  # nobody stores before all of it is loaded
        tl.store(f_ptr + at_f + at_KV, state_KV, mask=live_KV)
        if i_segment + 1 < used:
            tl.debug_barrier()  # the state comes back in slices that other threads wrote
            state_KV = f_KV
            for i_slice in tl.range(0, K // BK):
                i_BK = i_slice * BK + tl.arange(0, BK)
                at_m = (run * H + i_hv // (HV // H)) * keys * keys
                live_KB = (i_K < keys)[:, None] & (i_BK < keys)[None, :]
                m_KB = tl.load(m_ptr + at_m + i_K[:, None] * keys + i_BK[None, :], mask=live_KB, other=0.0)
                live_BV = (i_BK < keys)[:, None] & (i_V < values)[None, :]
                at_BV = i_BK[:, None] * values + i_V[None, :]
                start_BV = tl.load(f_ptr + at_f + at_BV, mask=live_BV, other=0.0)
                state_KV = tl.dot(m_KB, start_BV, state_KV, input_precision="ieee" if EXACT else "tf32x3")


_SIZES = dict.fromkeys(("T", "H", "HV", "segments", "length", "key_size", "value_size"), "i32")
SUMMARISE = Kernel(
    name="summarise",
    function=summarise_kernel,
    types={"e": "*q", "kx": "*q", "decay": "*fp32", "v": "*q", "w": "*q", "cu_seqlens": "*i64"}
    | _SIZES
    | {"m": "*fp32", "f": "*fp32"},
    options={"PACKED": (0, 1), "MASKED": (0, 1)},
    grid="(N * segments * (HV * V / BV + H * K / BV), 1, 1)",
)
CHAIN = Kernel(
    name="chain",
    function=chain_kernel,
    types={"m": "*fp32", "state": "*fp32", "cu_seqlens": "*i64"} | _SIZES | {"f": "*fp32"},
    options={"STATE": (0, 1), "PACKED": (0, 1), "MASKED": (0, 1), "EXACT": (0, 1)},
    grid="(N * HV * V / BV, 1, 1)",
)


def starts_bytes(N: int, segments: int, H: int, HV: int, key_size: int, V: int) -> int:
    """Of m and f: what `starts` allocates."""
    return 4 * N * segments * key_size * (H * key_size + HV * V)


def starts(
    prepared: Workspace,
    v: Tensor,
    w: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    segments: int,
    length: int,
    key_size: int,
) -> Tensor:
    """The state before each segment of `length` chunks: [N, segments, HV, key_size, V]. v, w, state are contiguous."""
    (_, T, HV, V), H = v.shape, prepared.e.shape[1]
    N, new = sequences(v, cu_seqlens), prepared.decay.new_empty
    m, f = new(N, segments, H, key_size, key_size), new(N, segments, HV, key_size, V)
    sizes, packed, masked = (
        (T, H, HV, segments, length, key_size, V),
        int(cu_seqlens is not None),
        is_masked(key_size, V),
    )
    SUMMARISE.launch(
        lambda c: (N * segments * (HV * (c["V"] // c["BV"]) + H * (c["K"] // c["BV"])),),
        v.device,
        v.dtype,
        key_size,
        V,
        *(prepared.e, prepared.kx, prepared.decay, v, w, cu_seqlens, *sizes, m, f),
        PACKED=packed,
        MASKED=masked,
    )
    CHAIN.launch(
        lambda c: (N * HV * (c["V"] // c["BV"]),),
        v.device,
        v.dtype,
        key_size,
        V,
        *(m, state, cu_seqlens, *sizes, f),
        STATE=int(state is not None),
        PACKED=packed,
        MASKED=masked,
        EXACT=int(v.dtype == torch.float32),
    )
    return f
