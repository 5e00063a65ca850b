"""`prepare`: everything about a chunk that needs no state. Equations, letters and workspace: chunk_forward.py.

Decays. Every sum of g runs over the tokens it decays and nothing is subtracted, so that a reset (g = -30) costs no
digits, and every factor is at most 1: block p's rows are anchored on the first row of the later block of the pair,
`head` from there to the row, `reach` from the row to the first row of the next block. Inside a block both factors
stand on its first row and one of them is 1 / gamma: right in rows that decayed by less than SPAN octaves since. Where a
slice of keys has rows with more, the pairwise form makes them, sixteen diagonals at a time; the branch is one for the
program, the choice is of the row, so that no token knows what comes after it.

Digits. A rounding of T grows in A by the length of the chunk, and T has those of its decays in it. In float32 T, its
decays, A, and what A multiplies, are float64 until they are stored (decision 0005); gamma and tail are float32.

Kt waits for A in registers, in float32, which has none to spare, where Kx will be; there Aqk waits where Ax will be.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn2_ops.kernels import tiles
from gdn2_ops.kernels.kernel import A_DTYPES, DTYPES, Kernel, is_masked
from gdn2_ops.kernels.products import load_triangle, loaded_product, product, store_a, store_triangle, triangle_size

C = 64
FOR_RECUR, FOR_RECUR_BACK = tl.constexpr(1), tl.constexpr(2)  # which of the backward pass reads a workspace, bits
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def scores(e_CK, q_CK, k_CK, here_CC, t_CC, aqk_CC, dtype: tl.constexpr):
    """T and Aqk of one slice more.

    In float32 where they belong `here` and nowhere else: there are no registers for two pairs.
    """
    k_KC = tl.trans(k_CK)
    if dtype == tl.float32:
        t_CC = tl.where(here_CC, product(e_CK, k_KC, t_CC, dtype), t_CC)
        aqk_here_CC = product(q_CK.to(tl.float32), k_KC.to(tl.float32), aqk_CC, dtype)
        return t_CC, tl.where(here_CC, aqk_here_CC, aqk_CC)
    else:
        return product(e_CK, k_KC, t_CC, dtype), product(q_CK, k_KC, aqk_CC, dtype)


@triton.jit
def locate(cu_seqlens_ptr, i_slot, T, N, C: tl.constexpr, PACKED: tl.constexpr):
    """The first token of a slot's chunk as a row of [B T], and how many it has: none or fewer where none is there."""
    if PACKED:
        low, high = i_slot * 0, i_slot * 0 + N
        while high - low > 1:
            middle = (low + high) // 2
            before = tl.load(cu_seqlens_ptr + middle).to(tl.int32) // C + middle <= i_slot
            low, high = tl.where(before, middle, low), tl.where(before, high, middle)
        begin = tl.load(cu_seqlens_ptr + low).to(tl.int32)
        end = tl.load(cu_seqlens_ptr + low + 1).to(tl.int32)
        at = begin + (i_slot - begin // C - low) * C
        return at.to(tl.int64), tl.minimum(end - at, C)
    else:
        chunks = tl.cdiv(T, C)
        i_c = i_slot % chunks
        return (i_slot // chunks).to(tl.int64) * T + i_c * C, tl.minimum(T - i_c * C, C)


@triton.jit
def along_blocks(x_PK, chosen_PP):
    """Row p is the sum of the rows chosen for it: exact, where a difference of running sums would not be."""
    return tl.sum(tl.where(chosen_PP[:, :, None], x_PK[None, :, :], 0.0), 1)


@triton.jit
def pairwise(q_PRK, e_PRK, k_ptr, g_ptr, at_PRK, live_PRK, stride):
    """Scores inside the blocks diagonal by diagonal, every decay a sum of its own: right for any g <= 0."""
    P: tl.constexpr = q_PRK.shape[0]
    i_R = tl.arange(0, 16)
    t_PRR = tl.zeros([P, 16, 16], e_PRK.dtype)
    aqk_PRR = tl.zeros([P, 16, 16], tl.float32)
    span_PRK = tl.zeros(e_PRK.shape, e_PRK.dtype)  # log2 of the decay from token i - d to token i
    for d in range(16):
        inside_PRK = live_PRK & (i_R >= d)[None, :, None]
        k_PRK = tl.load(k_ptr + at_PRK - d * stride, mask=inside_PRK, other=0.0).to(e_PRK.dtype)
        k_PRK *= tl.exp2(span_PRK)
        diagonal_PRR = (i_R[:, None] == i_R[None, :] + d)[None, :, :]
        t_PRR += tl.where(diagonal_PRR, tl.sum(e_PRK * k_PRK, 2)[:, :, None], 0.0)
        aqk_PRR += tl.where(diagonal_PRR, tl.sum(q_PRK * k_PRK.to(tl.float32), 2)[:, :, None], 0.0)
        span_PRK += tl.load(g_ptr + at_PRK - d * stride, mask=inside_PRK, other=0.0).to(e_PRK.dtype) * LOG2_E
    return t_PRR, aqk_PRR


@triton.jit
def neighbours(i, size: tl.constexpr):
    """Where the row is in the second group of `size` of a pair and the column in the first."""
    row, column = (i // size)[:, None], (i // size)[None, :]
    return (row == column + 1) & (row % 2 == 1)


@triton.jit
def on_diagonal(x_PRR):
    """The matrix of these blocks on its diagonal and zeros."""
    P: tl.constexpr = x_PRR.shape[0]
    i_P = tl.arange(0, P)
    same_PRPR = (i_P[:, None] == i_P[None, :])[:, None, :, None]
    return tl.reshape(tl.where(same_PRPR, x_PRR[:, :, None, :], 0.0), [P * 16, P * 16])


@triton.jit
def invert(t_PRR, t_CC, dtype: tl.constexpr):
    """(I + T)^-1 of the strictly lower T: blocks t_PRR on the diagonal, the rest in t_CC.

    [[X, 0], [L, Y]]^-1 = [[X^-1, 0], [-Y^-1 L X^-1, Y^-1]] for pairs of 1, 2, 4, ... rows: every step is exact and
    none forms a power of T.
    """
    P: tl.constexpr = t_PRR.shape[0]
    i_R = tl.arange(0, 16)
    one_RR = tl.where(i_R[:, None] == i_R[None, :], 1.0, 0.0)
    x_PRR = one_RR[None, :, :] - tl.where(neighbours(i_R, 1)[None, :, :], t_PRR, 0.0)
    for log_half in tl.static_range(1, 4):
        link_PRR = tl.where(neighbours(i_R, 1 << log_half)[None, :, :], t_PRR, 0.0)
        step_PRR = product(x_PRR, link_PRR, tl.zeros_like(x_PRR), dtype)
        x_PRR = product(-step_PRR, x_PRR, x_PRR, dtype)

    x_CC = on_diagonal(x_PRR)
    i_C = tl.arange(0, P * 16)
    for log_half in tl.static_range(4, 6):
        link_CC = tl.where(neighbours(i_C, 1 << log_half), t_CC, 0.0)
        step_CC = product(x_CC, link_CC, tl.zeros_like(x_CC), dtype)
        x_CC = product(-step_CC, x_CC, x_CC, dtype)
    return x_CC


@triton.jit(do_not_specialize=["T", "H", "N", "key_size", "backward"])
def prepare_kernel(
    # inputs
    q_ptr,
    k_ptr,
    g_ptr,
    b_ptr,
    cu_seqlens_ptr,
    # sizes
    T,
    H,
    N,
    key_size,
    backward,
    scale,
    # outputs
    e_ptr,
    qd_ptr,
    kx_ptr,
    ax_ptr,
    ax_rest_ptr,
    a_ptr,
    decay_ptr,
    # constexprs
    K: tl.constexpr,
    V: tl.constexpr,
    PACKED: tl.constexpr,
    MASKED: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
):
    operand: tl.constexpr = e_ptr.dtype.element_ty
    EXACT: tl.constexpr = operand == tl.float32
    WIDE: tl.constexpr = tl.float64 if EXACT else tl.float32
    # of float16 too inside blocks, where 1 / gamma passes its range
    FINE: tl.constexpr = "ieee" if EXACT else ("tf32x3" if operand == tl.float16 else "tf32")
    SPAN: tl.constexpr = 4.0 if EXACT else 100.0  # octaves; float32: more would cost digits
    P: tl.constexpr = C // 16
    SLICES: tl.constexpr = K // BK

    i_slot, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    first, tokens = locate(cu_seqlens_ptr, i_slot, T, N, C, PACKED)
    if tokens <= 0:
        return
    keys = key_size if MASKED else K
    at_head = (first * H + i_h) * keys
    stride = H * keys  # of tokens
    at_slot = i_slot.to(tl.int64) * H + i_h

    i_P, i_R, i_C = tl.arange(0, P), tl.arange(0, 16), tl.arange(0, C)
    row_PR1 = (i_P[:, None] * 16 + i_R[None, :])[:, :, None]
    odd_P11 = (i_P % 2 == 1)[:, None, None]
    late_P11 = (i_P >= P // 2)[:, None, None]
    before_PP = i_P[:, None] > i_P[None, :]
    after_PP = i_P[:, None] < i_P[None, :]
    middle_PP = ((i_P[:, None] == 0) & (i_P[None, :] == 1)) | ((i_P[:, None] == 3) & (i_P[None, :] == 2))
    near_CC, far_CC = neighbours(i_C, 16), neighbours(i_C, 32)

    t_CC, aqk_CC = tl.zeros([C, C], WIDE), tl.zeros([C, C], tl.float32)
    t_PRR, aqk_PRR = tl.zeros([P, 16, 16], WIDE), tl.zeros([P, 16, 16], tl.float32)
    if not EXACT:
        t_far_CC, aqk_far_CC = t_CC, aqk_CC
        kt_PRSK = tl.zeros([P, 16, SLICES, BK], operand)
    for i_slice in tl.range(0, SLICES):
        i_K = i_slice * BK + tl.arange(0, BK)
        live_PRK = (row_PR1 < tokens) & (i_K < keys)[None, None, :]
        at_PRK = row_PR1 * stride + i_K[None, None, :]
        at_work_PRK = row_PR1 * K + i_K[None, None, :]
        q_PRK = tl.load(q_ptr + at_head + at_PRK, mask=live_PRK, other=0.0).to(tl.float32) * scale
        k_PRK = tl.load(k_ptr + at_head + at_PRK, mask=live_PRK, other=0.0).to(WIDE)
        e_PRK = tl.load(b_ptr + at_head + at_PRK, mask=live_PRK, other=0.0).to(WIDE) * k_PRK

        # log2 of decays: `head` from the block's first row, `reach` to the next block's, `link` from one to the other
        later_PRK = live_PRK & (i_R > 0)[None, :, None]
        next_PRK = (row_PR1 + 1 < tokens) & (i_K < keys)[None, None, :]
        g_head_PRK = tl.load(g_ptr + at_head + at_PRK, mask=later_PRK, other=0.0).to(WIDE) * LOG2_E
        g_next_PRK = tl.load(g_ptr + at_head + stride + at_PRK, mask=next_PRK, other=0.0).to(WIDE) * LOG2_E
        g_first_K = tl.load(g_ptr + at_head + i_K, mask=i_K < keys, other=0.0).to(WIDE) * LOG2_E
        head_PRK = tl.cumsum(g_head_PRK, 1)
        reach_PRK = tl.cumsum(g_next_PRK, 1, reverse=True)
        link_PK = tl.sum(g_next_PRK, 1)
        to_head_PRK = tl.exp2(head_PRK)
        to_reach_PRK = tl.exp2(reach_PRK)

        before_PK = (along_blocks(link_PK, before_PP) + g_first_K[None, :]).to(tl.float32)
        gamma_PRK = to_head_PRK.to(tl.float32) * tl.exp2(before_PK)[:, None, :]
        tail_PRK = to_reach_PRK.to(tl.float32) * tl.exp2(along_blocks(link_PK, after_PP).to(tl.float32))[:, None, :]
        if backward != FOR_RECUR:
            tl.store(qd_ptr + at_slot * C * K + at_work_PRK, (q_PRK * gamma_PRK).to(operand))
        tl.store(e_ptr + at_slot * C * K + at_work_PRK, (e_PRK.to(tl.float32) * gamma_PRK).to(operand))
        if EXACT:
            tl.store(kx_ptr + at_slot * C * K + at_work_PRK, k_PRK.to(tl.float32) * tail_PRK)
        else:
            here_S1 = (tl.arange(0, SLICES) == i_slice)[:, None]
            kt_PRSK = tl.where(here_S1[None, None, :, :], (k_PRK * tail_PRK).to(operand)[:, :, None, :], kt_PRSK)
        tl.store(decay_ptr + at_slot * K + i_K, tl.exp2(tl.sum(link_PK, 0) + g_first_K))

        k_PKR = tl.permute(k_PRK * tl.exp2(tl.minimum(-head_PRK, SPAN)), (0, 2, 1))
        t_slice_PRR = tl.dot(e_PRK * to_head_PRK, k_PKR, input_precision=FINE, out_dtype=WIDE)
        qd_PRK = (q_PRK * to_head_PRK).to(tl.float32)
        aqk_slice_PRR = tl.dot(qd_PRK, k_PKR.to(tl.float32), input_precision=FINE)
        if tl.min(head_PRK) < -SPAN:
            t, aqk = pairwise(q_PRK, e_PRK, k_ptr + at_head, g_ptr + at_head, at_PRK, live_PRK, stride)
            steep_PR1 = tl.min(head_PRK, 2)[:, :, None] < -SPAN
            t_slice_PRR = tl.where(steep_PR1, t, t_slice_PRR)
            aqk_slice_PRR = tl.where(steep_PR1, aqk, aqk_slice_PRR)
        t_PRR += t_slice_PRR
        aqk_PRR += aqk_slice_PRR

        # pairs of blocks, then of halves: rows of the later one, columns of the earlier one, both from its first row
        x_PRK = tl.where(odd_P11, to_head_PRK, to_reach_PRK)
        e_CK, q_CK = tl.reshape(e_PRK * x_PRK, [C, BK]), tl.reshape(q_PRK * x_PRK, [C, BK])
        k_CK = tl.reshape(k_PRK * x_PRK, [C, BK])
        t_CC, aqk_CC = scores(e_CK, q_CK, k_CK, near_CC, t_CC, aqk_CC, operand)
        x_PRK = tl.where(late_P11, to_head_PRK, to_reach_PRK) * tl.exp2(along_blocks(link_PK, middle_PP))[:, None, :]
        e_CK, q_CK = tl.reshape(e_PRK * x_PRK, [C, BK]), tl.reshape(q_PRK * x_PRK, [C, BK])
        k_CK = tl.reshape(k_PRK * x_PRK, [C, BK])
        if EXACT:
            t_CC, aqk_CC = scores(e_CK, q_CK, k_CK, far_CC, t_CC, aqk_CC, operand)
        else:
            t_far_CC, aqk_far_CC = scores(e_CK, q_CK, k_CK, far_CC, t_far_CC, aqk_far_CC, operand)

    at_triangle = at_slot * triangle_size(C)
    aqk_PRR = tl.where((i_R[:, None] >= i_R[None, :])[None, :, :], aqk_PRR, 0.0)
    if not EXACT:
        t_CC = tl.where(near_CC, t_CC, t_far_CC)
        aqk_CC = tl.where(near_CC, aqk_CC, tl.where(far_CC, aqk_far_CC, 0.0))
    aqk_CC += on_diagonal(aqk_PRR)
    if EXACT and backward != FOR_RECUR:
        store_triangle(ax_ptr + at_triangle, aqk_CC)
    a_CC = invert(t_PRR, t_CC, operand)
    if backward & FOR_RECUR:
        store_a(a_ptr + at_triangle, a_CC, operand)
    if EXACT:
        tl.debug_barrier()  # Aqk and Kt come back from other threads
        if backward != FOR_RECUR:
            aqk_CC = load_triangle(ax_ptr + at_triangle, C)
            ax_CC = product(aqk_CC.to(WIDE), a_CC, tl.zeros([C, C], WIDE), operand)
            tl.debug_barrier()
            store_triangle(ax_ptr + at_triangle, ax_CC)
        for i_slice in tl.range(0, SLICES):
            at_CK = at_slot * C * K + i_C[:, None] * K + (i_slice * BK + tl.arange(0, BK))[None, :]
            kt_CK = tl.load(kx_ptr + at_CK).to(WIDE)
            kx_CK = product(tl.trans(a_CC), kt_CK, tl.zeros([C, BK], WIDE), operand)
            tl.debug_barrier()
            tl.store(kx_ptr + at_CK, kx_CK)
    else:
        if backward != FOR_RECUR:
            ax_CC = product(aqk_CC, a_CC, tl.zeros([C, C], tl.float32), operand)
            store_triangle(ax_ptr + at_triangle, ax_CC.to(operand))
            if operand == tl.float16 and backward & FOR_RECUR_BACK:
                store_triangle(ax_rest_ptr + at_triangle, (ax_CC - ax_CC.to(operand).to(tl.float32)).to(operand))
        kx_CK = product(tl.trans(a_CC), tl.reshape(kt_PRSK, [C, K]), tl.zeros([C, K], tl.float32), operand)
        tl.store(kx_ptr + at_slot * C * K + i_C[:, None] * K + tl.arange(0, K)[None, :], kx_CK.to(operand))


@triton.jit
def bounds(cu_seqlens_ptr, i_n, T, C: tl.constexpr, PACKED: tl.constexpr):
    """First token as a row of [B T], tokens and first slot of a sequence."""
    if PACKED:
        begin = tl.load(cu_seqlens_ptr + i_n).to(tl.int32)
        end = tl.load(cu_seqlens_ptr + i_n + 1).to(tl.int32)
        return begin.to(tl.int64), end - begin, begin // C + i_n
    else:
        return i_n.to(tl.int64) * T, T, i_n * tl.cdiv(T, C)


@triton.jit
def minus_taken(e_ptr, at_slot, z_CV, state_KV, C: tl.constexpr, K: tl.constexpr):
    """X of a chunk; state_KV in the dtype of the workspace."""
    taken_CV = loaded_product(e_ptr + at_slot * C * K, K, 1, state_KV, tl.zeros(z_CV.shape, tl.float32))
    return (z_CV - taken_CV).to(e_ptr.dtype.element_ty)


@triton.jit
def carried(decay_ptr, kx_ptr, at_slot, x_CV, state_KV, C: tl.constexpr, K: tl.constexpr):
    """The state after a chunk."""
    state_KV *= tl.load(decay_ptr + at_slot * K + tl.arange(0, K))[:, None]
    return loaded_product(kx_ptr + at_slot * C * K, 1, K, x_CV, state_KV)


class Workspace(NamedTuple):
    """What `prepare` writes, in the layout of chunk_forward.py; what nobody wants has no numbers."""

    e: Tensor
    qd: Tensor
    kx: Tensor
    ax: Tensor
    ax_rest: Tensor
    a: Tensor
    decay: Tensor


PREPARE = Kernel(
    name="prepare",
    function=prepare_kernel,
    types=dict.fromkeys(("q", "k"), "*q")
    | {"g": "*fp32", "b": "*q", "cu_seqlens": "*i64"}
    | dict.fromkeys(("T", "H", "N", "key_size", "backward"), "i32")
    | {"scale": "fp32"}
    | dict.fromkeys(("e", "qd", "kx", "ax", "ax_rest"), "*q")
    | {"a": "*a", "decay": "*fp32"},
    options={"PACKED": (0, 1), "MASKED": (0, 1)},
    grid="(slots * H, 1, 1)",
)


def sequences(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """N of x [B, T, ...]."""
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def slots(x: Tensor, cu_seqlens: Tensor | None, size: int) -> int:
    """How many chunks of `size` tokens of x [B, T, ...] have a place, those of packed sequences that are never touched
    included."""
    B, T = x.shape[:2]
    return B * triton.cdiv(T, size) if cu_seqlens is None else T // size + sequences(x, cu_seqlens)


def workspace_layout(
    q: Tensor, cu_seqlens: Tensor | None, backward: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor of a Workspace. backward as in `prepare`."""
    chunks, H, K = slots(q, cu_seqlens, C), q.shape[2], tiles.head_size(q.shape[3])
    if_read = 0 if backward == FOR_RECUR.value else chunks
    if_rest = chunks if backward & FOR_RECUR_BACK.value and q.dtype == torch.float16 else 0
    if_a = chunks if backward & FOR_RECUR.value else 0
    return {
        "e": ((chunks, H, C, K), q.dtype),
        "qd": ((if_read, H, C, K), q.dtype),
        "kx": ((chunks, H, C, K), q.dtype),
        "ax": ((if_read, H, triangle_size(C)), q.dtype),
        "ax_rest": ((if_rest, H, triangle_size(C)), q.dtype),
        "a": ((if_a, H, triangle_size(C)), A_DTYPES[DTYPES[q.dtype]]),
        "decay": ((chunks, H, K), torch.float32),
    }


def workspace_bytes(q: Tensor, cu_seqlens: Tensor | None, backward: int) -> int:
    layout = workspace_layout(q, cu_seqlens, backward).values()
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout)


def prepare(
    q: Tensor, k: Tensor, g: Tensor, b: Tensor, cu_seqlens: Tensor | None, scale: float, *, backward: int = 0
) -> Workspace:
    """Launches `prepare`. Tensors of other strides than contiguous ones are copied, here and below.

    backward: 0, or FOR_RECUR, which reads A, and alone neither Qd nor Ax; or FOR_RECUR_BACK, which reads ax_rest of
        float16; or both.
    """
    _, T, H, key_size = q.shape
    layout = workspace_layout(q, cu_seqlens, backward)
    out = Workspace(**{name: q.new_empty(shape, dtype=dtype) for name, (shape, dtype) in layout.items()})
    N = sequences(q, cu_seqlens)
    inputs = (q.contiguous(), k.contiguous(), g.contiguous(), b.contiguous(), cu_seqlens)
    PREPARE.launch(
        (out.e.shape[0] * H,),
        q.device,
        q.dtype,
        key_size,
        key_size,
        *(*inputs, T, H, N, key_size, backward, scale, *out),
        PACKED=int(cu_seqlens is not None),
        MASKED=is_masked(key_size, key_size),
    )
    return out
