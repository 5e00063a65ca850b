"""Whole sequences in two kernels: everything about a chunk that needs no state, then the walk over the chunks.

With E = gamma*b*k, Z = w*v, T, Aqk and A = (I + T)^-1 of docs/derivation.md (3)-(8), a chunk takes the state S by (16)
to

    X = Z - E S          O = Qd S + Ax X         S' = Diag(decay) S + Kx^T X
    Qd = scale gamma*q   Ax = Aqk A              Kx = A^T (tail*k)             decay = gamma of the last token

`prepare`: one program per (slot, key head), in parallel over all chunks. q, k, g, b -> E, Qd, Kx, Ax, decay, and A.
`recur`:   one program per (sequence, segment, value head, BV value channels), serial over chunks, S in registers.
           With BACKWARD it writes what the backward pass needs, S before each group of chunks and R = A X, not o.

Letters: C = 64 tokens of a chunk, P = 4 blocks of R = 16 tokens in it; K V the compiled head sizes (tiles.py) and
key_size, value_size those of the call, smaller where MASKED; BK, BV channels of a slice of keys, of a tile of values.
N sequences; HV value heads in groups of HV / H that share a key head.

The workspace, written by `prepare`. Chunk c of sequence n has slot n ceil(T / C) + c; packed sequences start at slot
begin_n // C + n instead, which needs no table: there are T // C + N slots and those left over are never touched. Groups
of G chunks have places of their own, by the same rule with G C. Tokens past the end of a sequence are rows of
zeros, of A the identity's. q's dtype, but decay is float32 and a has a dtype of its own (A_DTYPES in kernel.py,
`store_a`, decision 0005). Of the matrices of a chunk the blocks of 16 up to the diagonal are stored (`in_triangle`):

    e, qd, kx [slots, H, C, K]      ax [slots, H, C (C + 16) / 2]      decay [slots, H, K]      (K: zeros past key_size)
    BACKWARD:  a like ax, for float16 also ax_rest, the difference between Ax and ax
               states [groups, HV, key_size, value_size]      r [B, T, HV, V] like v

A token sees the ones before it only, bit for bit, as long as all of its chunk is finite: zeros of Ax times an infinity
are NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn2_ops.kernels import tiles
from gdn2_ops.kernels.kernel import Kernel, is_masked
from gdn2_ops.kernels.prepare import PREPARE, C, Workspace, bounds, carried, minus_taken, prepare, sequences, slots
from gdn2_ops.kernels.products import applied, loaded_product, triangle_product, triangle_size
from gdn2_ops.kernels.segments import CHAIN, SUMMARISE, starts


@triton.constexpr_function
def group(bits):
    """G: chunks that share a kept state in the backward pass, by the bits of an operand. gradients.py carries it over
    the others; float32's, which takes twice the memory, over more."""
    return 5 if bits == 32 else 3


@triton.jit(do_not_specialize=["T", "H", "HV", "segments", "length", "key_size", "value_size"])
def recur_kernel(
    # inputs
    e_ptr,
    qd_ptr,
    kx_ptr,
    ax_ptr,
    a_ptr,
    decay_ptr,
    v_ptr,
    w_ptr,
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
    # outputs
    o_ptr,
    final_state_ptr,
    states_ptr,
    r_ptr,
    # constexprs
    K: tl.constexpr,
    V: tl.constexpr,
    STATE: tl.constexpr,
    PACKED: tl.constexpr,
    BACKWARD: tl.constexpr,
    MASKED: tl.constexpr,
    C: tl.constexpr,
    BV: tl.constexpr,
):
    operand: tl.constexpr = e_ptr.dtype.element_ty
    G: tl.constexpr = group(operand.primitive_bitwidth)
    i_v = tl.program_id(0) % (V // BV)
    i_hv = tl.program_id(0) // (V // BV) % HV
    i_run = tl.program_id(0) // (V // BV * HV)  # of N * segments
    i_n = i_run // segments
    first, tokens, first_slot = bounds(cu_seqlens_ptr, i_n, T, C, PACKED)
    _, _, first_group = bounds(cu_seqlens_ptr, i_n, T, G * C, PACKED)
    chunks = tl.cdiv(tokens, C)
    begin = i_run % segments * length
    end = tl.minimum(begin + length, chunks)
    keys, values = key_size if MASKED else K, value_size if MASKED else V

    i_C, i_K, i_V = tl.arange(0, C), tl.arange(0, K), i_v * BV + tl.arange(0, BV)
    live_KV = (i_K < keys)[:, None] & (i_V < values)[None, :]
    at_KV = i_K[:, None] * values + i_V[None, :]
    if STATE:
        at_state = (i_run.to(tl.int64) * HV + i_hv) * keys * values
        state_KV = tl.load(state_ptr + at_state + at_KV, mask=live_KV, other=0.0)
    else:
        state_KV = tl.zeros([K, BV], tl.float32)

    for i_c in tl.range(begin, end):
        slot = (first_slot + i_c).to(tl.int64)
        at_slot = slot * H + i_hv // (HV // H)
        row = i_c * C
        at_token = ((first + row) * HV + i_hv) * values
        at_CV = i_C[:, None] * (HV * values) + i_V[None, :]
        live_CV = (row + i_C < tokens)[:, None] & (i_V < values)[None, :]
        z_CV = tl.load(w_ptr + at_token + at_CV, mask=live_CV, other=0.0).to(tl.float32)
        z_CV *= tl.load(v_ptr + at_token + at_CV, mask=live_CV, other=0.0).to(tl.float32)
        operand_KV = state_KV.to(operand)
        x_CV = minus_taken(e_ptr, at_slot, z_CV, operand_KV, C, K)
        if BACKWARD:
            if i_c % G == 0:
                at_states = ((first_group + i_c // G).to(tl.int64) * HV + i_hv) * keys * values
                tl.store(states_ptr + at_states + at_KV, operand_KV, mask=live_KV)
            r_CV = applied(a_ptr + at_slot * triangle_size(C), C, x_CV, operand)
            tl.store(r_ptr + at_token + at_CV, r_CV.to(operand), mask=live_CV)
        else:
            o_CV = loaded_product(qd_ptr + at_slot * C * K, K, 1, operand_KV, tl.zeros([C, BV], tl.float32))
            o_CV = triangle_product(ax_ptr + at_slot * triangle_size(C), x_CV, o_CV, 1)
            tl.store(o_ptr + at_token + at_CV, o_CV.to(operand), mask=live_CV)
        state_KV = carried(decay_ptr, kx_ptr, at_slot, x_CV, state_KV, C, K)

    if not BACKWARD:  # noqa: SIM102, one is a constexpr
        if (end == chunks) & ((begin < chunks) | (begin == 0)):  # the last segment that has chunks
            at_state = (i_n.to(tl.int64) * HV + i_hv) * keys * values
            tl.store(final_state_ptr + at_state + at_KV, state_KV, mask=live_KV)


def _described(name: str, masked: int) -> Kernel:
    types = dict.fromkeys(("e", "qd", "kx", "ax"), "*q") | {"a": "*a", "decay": "*fp32"}
    types |= {"v": "*q", "w": "*q", "state": "*fp32", "cu_seqlens": "*i64"}
    types |= dict.fromkeys(("T", "H", "HV", "segments", "length", "key_size", "value_size"), "i32")
    return Kernel(
        name=name,
        function=recur_kernel,
        types=types | {"o": "*q", "final_state": "*fp32", "states": "*q", "r": "*q"},
        options={"STATE": (0, 1), "PACKED": (0, 1), "BACKWARD": (0, 1), "MASKED": (masked,)},
        grid="(N * segments * HV * V / BV, 1, 1)",
    )


RECUR = (_described("recur", 0), _described("recur_masked", 1))  # by MASKED: other tiles
KERNELS = (PREPARE, *RECUR, SUMMARISE, CHAIN)


def chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`torch.ops.gdn2.chunk` on a GPU. The values of cu_seqlens stay on the device and are not read here."""
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    return recur(prepare(q, k, g, b, cu_seqlens, scale), v, w, state, cu_seqlens, q.shape[3])


def recur(
    prepared: Workspace, v: Tensor, w: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, key_size: int
) -> tuple[Tensor, Tensor]:
    """Launches `recur`, in segments where that is faster, for o [B, T, HV, V] and the final state [N, HV, K, V]."""
    N = sequences(v, cu_seqlens)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    final_state = prepared.decay.new_empty(N, v.shape[2], key_size, v.shape[3])
    _launch_recur(prepared, v, w, state, cu_seqlens, (o, final_state, None, None), key_size)
    return o, final_state


def segments_of_walk(v: Tensor, cu_seqlens: Tensor | None) -> int:
    """Into how many segments `recur` walks each sequence, 1 where not in segments."""
    programs = sequences(v, cu_seqlens) * v.shape[2] * triton.cdiv(v.shape[3], 64)
    return tiles.segments(programs, triton.cdiv(v.shape[1], C))


def kept_groups(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many groups of chunks have a place, of x [B, T, ...] in q's dtype."""
    return slots(x, cu_seqlens, group(8 * x.dtype.itemsize) * C)


def kept_states(v: Tensor, cu_seqlens: Tensor | None, key_size: int) -> Tensor:
    """Memory for a state of every group of chunks, [groups, HV, key_size, value_size]."""
    return v.new_empty(kept_groups(v, cu_seqlens), v.shape[2], key_size, v.shape[3])


def recur_for_backward(
    prepared: Workspace, v: Tensor, w: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, key_size: int
) -> tuple[Tensor, Tensor]:
    """Launches `recur` for the states before each group of chunks [groups, HV, K, V] and r [B, T, HV, V]."""
    r, states = torch.empty_like(v, memory_format=torch.contiguous_format), kept_states(v, cu_seqlens, key_size)
    _launch_recur(prepared, v, w, state, cu_seqlens, (None, None, states, r), key_size)
    return states, r


def _launch_recur(
    prepared: Workspace,
    v: Tensor,
    w: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    outputs: tuple,
    key_size: int,
) -> None:
    (_, T, HV, V), H = v.shape, prepared.e.shape[1]
    N, segments = sequences(v, cu_seqlens), segments_of_walk(v, cu_seqlens)
    v, w, state = v.contiguous(), w.contiguous(), None if state is None else state.contiguous()
    length = triton.cdiv(triton.cdiv(T, C), segments)
    if segments > 1:
        state = starts(prepared, v, w, state, cu_seqlens, segments, length, key_size)
    operands = (prepared.e, prepared.qd, prepared.kx, prepared.ax, prepared.a, prepared.decay)
    masked = is_masked(key_size, V)
    RECUR[masked].launch(
        lambda c: (N * segments * HV * (c["V"] // c["BV"]),),
        v.device,
        v.dtype,
        key_size,
        V,
        *(*operands, v, w, state, cu_seqlens, T, H, HV, segments, length, key_size, V, *outputs),
        STATE=int(state is not None),
        PACKED=int(cu_seqlens is not None),
        BACKWARD=int(outputs[0] is None),
        MASKED=masked,
    )
