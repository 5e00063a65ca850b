"""`gradients`: dq, dk, dg, db of a chunk, once the states around it, R and dX are known. Letters: chunk_backward.py.

The decays of `prepare` are products of factors at most 1 (`head`, `reach`, `link` in prepare.py), and gradients go back
the same way: `pull` takes them through scores whose decay is a factor of the row times one of the column, and the
exponent of a factor hands its gradient to the tokens that it spans and to no others. Equation (13) subtracts sums over
the whole chunk instead, in which what was rounded to bfloat16 on one side only does not cancel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gdn2_ops.kernels.kernel import Kernel
from gdn2_ops.kernels.prepare import LOG2_E, along_blocks, locate, neighbours


@triton.jit
def pull(dp_CC, dt_CC, q_CK, e_CK, k_CK, row_CK, column_CK, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Gradients of q, e and k from those of P = (row q) (column k)^T and T = (row e) (column k)^T."""
    dp_CC, dt_CC = dp_CC.to(dtype), dt_CC.to(dtype)
    k_CK = (k_CK * column_CK).to(dtype)
    dq_CK = row_CK * tl.dot(dp_CC, k_CK, input_precision=PRECISION)
    de_CK = row_CK * tl.dot(dt_CC, k_CK, input_precision=PRECISION)
    dk_CK = tl.dot(tl.trans(dp_CC), (q_CK * row_CK).to(dtype), input_precision=PRECISION)
    dk_CK = tl.dot(tl.trans(dt_CC), (e_CK * row_CK).to(dtype), dk_CK, input_precision=PRECISION)
    return dq_CK, de_CK, column_CK * dk_CK


@triton.jit
def add_pairwise(
    q_ptr,
    k_ptr,
    g_ptr,
    b_ptr,
    do_ptr,
    dx_ptr,
    r_ptr,
    dq_ptr,
    dk_ptr,
    dg_ptr,
    db_ptr,
    i_K,
    keys,
    values,
    tokens,
    key_stride,
    value_stride,
    group,
    scale,
    V: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds what the tokens of a block of 16 owe each other, diagonal by diagonal, every decay a sum of its own."""
    operand: tl.constexpr = q_ptr.dtype.element_ty
    BK: tl.constexpr = i_K.shape[0]
    i_R = tl.arange(0, 16)
    dp_RR, dt_RR = tl.zeros([16, 16], tl.float32), tl.zeros([16, 16], tl.float32)
    for part in tl.range(0, group * (V // BV)):
        i_V = part % (V // BV) * BV + tl.arange(0, BV)
        at_RV = i_R[:, None] * value_stride + (part // (V // BV) * values + i_V)[None, :]
        live_RV = (i_R < tokens)[:, None] & (i_V < values)[None, :]
        r_VR = tl.trans(tl.load(r_ptr + at_RV, mask=live_RV, other=0.0))
        do_RV = tl.load(do_ptr + at_RV, mask=live_RV, other=0.0)
        dp_RR = tl.dot(do_RV, r_VR, dp_RR, input_precision=PRECISION)
        dx_RV = tl.load(dx_ptr + at_RV, mask=live_RV, other=0.0)
        dt_RR = tl.dot(dx_RV, r_VR, dt_RR, input_precision=PRECISION)

    dq_RK, de_RK, dk_RK = tl.zeros([16, BK], tl.float32), tl.zeros([16, BK], tl.float32), tl.zeros([16, BK], tl.float32)
    to_row_RK = tl.zeros([16, BK], tl.float32)  # log2 of the decay from token i - d to token i
    to_later_RK = tl.zeros([16, BK], tl.float32)  # from token i to token i + d
    at_RK = i_R[:, None] * key_stride + i_K[None, :]
    keys_1K = (i_K < keys)[None, :]
    for d in range(16):
        diagonal_RR = i_R[:, None] == i_R[None, :] + d
        dp_d_RR = tl.where(diagonal_RR, dp_RR * scale, 0.0)
        dt_d_RR = tl.where(diagonal_RR & (d > 0), -dt_RR, 0.0)
        earlier_RK = ((i_R >= d) & (i_R < tokens))[:, None] & keys_1K
        k_RK = tl.load(k_ptr + at_RK - d * key_stride, mask=earlier_RK, other=0.0).to(tl.float32) * tl.exp2(to_row_RK)
        dq_RK += tl.sum(dp_d_RR, 1)[:, None] * k_RK
        de_RK += tl.sum(dt_d_RR, 1)[:, None] * k_RK
        to_row_RK += tl.load(g_ptr + at_RK - d * key_stride, mask=earlier_RK, other=0.0) * LOG2_E
        later_RK = ((i_R + d < 16) & (i_R + d < tokens))[:, None] & keys_1K
        to_later_RK += tl.load(g_ptr + at_RK + d * key_stride, mask=later_RK & (d > 0), other=0.0) * LOG2_E
        q_RK = tl.load(q_ptr + at_RK + d * key_stride, mask=later_RK, other=0.0).to(tl.float32)
        e_RK = tl.load(k_ptr + at_RK + d * key_stride, mask=later_RK, other=0.0).to(tl.float32)
        e_RK *= tl.load(b_ptr + at_RK + d * key_stride, mask=later_RK, other=0.0).to(tl.float32)
        dk_RK += (tl.sum(dp_d_RR, 0)[:, None] * q_RK + tl.sum(dt_d_RR, 0)[:, None] * e_RK) * tl.exp2(to_later_RK)

    live_RK = (i_R < tokens)[:, None] & keys_1K
    q_RK = tl.load(q_ptr + at_RK, mask=live_RK, other=0.0).to(tl.float32)
    k_RK = tl.load(k_ptr + at_RK, mask=live_RK, other=0.0).to(tl.float32)
    b_RK = tl.load(b_ptr + at_RK, mask=live_RK, other=0.0).to(tl.float32)
    dg_RK = tl.cumsum(q_RK * dq_RK + b_RK * k_RK * de_RK - k_RK * dk_RK, 0, reverse=True)
    dg_RK = tl.where((i_R > 0)[:, None], dg_RK, 0.0)
    dk_RK += b_RK * de_RK
    dq_RK = tl.load(dq_ptr + at_RK, mask=live_RK, other=0.0).to(tl.float32) + dq_RK
    dk_RK += tl.load(dk_ptr + at_RK, mask=live_RK, other=0.0).to(tl.float32)
    dg_RK += tl.load(dg_ptr + at_RK, mask=live_RK, other=0.0)
    db_RK = tl.load(db_ptr + at_RK, mask=live_RK, other=0.0).to(tl.float32) + k_RK * de_RK
    tl.debug_barrier()
    tl.store(dq_ptr + at_RK, dq_RK.to(operand), mask=live_RK)
    tl.store(dk_ptr + at_RK, dk_RK.to(operand), mask=live_RK)
    tl.store(dg_ptr + at_RK, dg_RK, mask=live_RK)
    tl.store(db_ptr + at_RK, db_RK.to(operand), mask=live_RK)


@triton.jit
def in_blocks(x_CK):
    return tl.reshape(x_CK, [x_CK.shape[0] // 16, 16, x_CK.shape[1]])


@triton.jit
def of_rows(x_PRK):
    return tl.reshape(x_PRK, [x_PRK.shape[0] * 16, x_PRK.shape[2]])


@triton.jit
def to_rows(x_PK):
    """Row p for each of the block's 16 tokens."""
    x_PRK = tl.broadcast_to(x_PK[:, None, :], [x_PK.shape[0], 16, x_PK.shape[1]])
    return of_rows(x_PRK)


@triton.jit(do_not_specialize=["T", "H", "HV", "N", "key_size", "value_size"])
def gradients_kernel(
    # inputs
    q_ptr,
    k_ptr,
    g_ptr,
    b_ptr,
    do_ptr,
    dx_ptr,
    r_ptr,
    states_ptr,
    dstates_ptr,
    cu_seqlens_ptr,
    # sizes
    T,
    H,
    HV,
    N,
    key_size,
    value_size,
    scale,
    # outputs
    dq_ptr,
    dk_ptr,
    dg_ptr,
    db_ptr,
    # constexprs
    K: tl.constexpr,
    V: tl.constexpr,
    PACKED: tl.constexpr,
    MASKED: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    operand: tl.constexpr = q_ptr.dtype.element_ty
    EXACT: tl.constexpr = operand == tl.float32
    PRECISION: tl.constexpr = "ieee" if EXACT else "tf32"
    INSIDE: tl.constexpr = tl.bfloat16 if operand == tl.bfloat16 else tl.float32  # 1 / gamma passes float16's range
    SPAN: tl.constexpr = 4.0 if EXACT else 100.0  # octaves; float32: more would cost digits of the exponent

    i_slot, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    first, tokens = locate(cu_seqlens_ptr, i_slot, T, N, C, PACKED)
    if tokens <= 0:
        return
    keys, values = key_size if MASKED else K, value_size if MASKED else V
    at_head = (first * H + i_h) * keys
    stride = H * keys  # of tokens

    i_C, i_P = tl.arange(0, C), tl.arange(0, C // 16)
    row_CC, column_CC = i_C[:, None], i_C[None, :]
    odd_C1, late_C1 = (i_C // 16 % 2 == 1)[:, None], (i_C >= C // 2)[:, None]
    before_PP, after_PP = i_P[:, None] > i_P[None, :], i_P[:, None] < i_P[None, :]
    behind_PP = i_P[:, None] == i_P[None, :] + 1
    middle_PP = ((i_P[:, None] == 0) & (i_P[None, :] == 1)) | ((i_P[:, None] == 3) & (i_P[None, :] == 2))
    of_middle_PP = ((i_P[:, None] == 1) & (i_P[None, :] == 0)) | ((i_P[:, None] == 2) & (i_P[None, :] == 3))

    parts = HV // H * (V // BV)  # of the values of this key head
    dp_CC, dt_CC = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for part in tl.range(0, parts):
        i_hv = i_h * (HV // H) + part // (V // BV)
        i_V = part % (V // BV) * BV + tl.arange(0, BV)
        at_token = (first * HV + i_hv) * values
        at_CV = i_C[:, None] * (HV * values) + i_V[None, :]
        live_CV = (i_C < tokens)[:, None] & (i_V < values)[None, :]
        r_VC = tl.trans(tl.load(r_ptr + at_token + at_CV, mask=live_CV, other=0.0))
        do_CV = tl.load(do_ptr + at_token + at_CV, mask=live_CV, other=0.0)
        dp_CC = tl.dot(do_CV, r_VC, dp_CC, input_precision=PRECISION)
        dx_CV = tl.load(dx_ptr + at_token + at_CV, mask=live_CV, other=0.0)
        dt_CC = tl.dot(dx_CV, r_VC, dt_CC, input_precision=PRECISION)
    dp_CC = tl.where(row_CC >= column_CC, dp_CC * scale, 0.0).to(operand)
    dt_CC = tl.where(row_CC > column_CC, -dt_CC, 0.0).to(operand)
    for i_slice in tl.range(0, K // BK, disable_licm=True):
        i_K = i_slice * BK + tl.arange(0, BK)
        dq_CK, de_CK = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
        dk_CK, ddecay_KV = tl.zeros([C, BK], tl.float32), tl.zeros([BK, BV], tl.float32)
        for part in tl.range(0, parts):
            i_hv = i_h * (HV // H) + part // (V // BV)
            i_V = part % (V // BV) * BV + tl.arange(0, BV)
            at_token = (first * HV + i_hv) * values
            at_CV = i_C[:, None] * (HV * values) + i_V[None, :]
            live_CV = (i_C < tokens)[:, None] & (i_V < values)[None, :]
            at_state = (i_slot.to(tl.int64) * HV + i_hv) * keys * values
            at_KV = i_K[:, None] * values + i_V[None, :]
            live_KV = (i_K < keys)[:, None] & (i_V < values)[None, :]
            state_KV = tl.load(states_ptr + at_state + at_KV, mask=live_KV, other=0.0)
            dstate_KV = tl.load(dstates_ptr + at_state + at_KV, mask=live_KV, other=0.0)
            ddecay_KV += dstate_KV.to(tl.float32) * state_KV.to(tl.float32)
            state_VK, dstate_VK = tl.trans(state_KV), tl.trans(dstate_KV)
            do_CV = tl.load(do_ptr + at_token + at_CV, mask=live_CV, other=0.0)
            dq_CK = tl.dot(do_CV, state_VK, dq_CK, input_precision=PRECISION)
            dx_CV = tl.load(dx_ptr + at_token + at_CV, mask=live_CV, other=0.0)
            de_CK = tl.dot(dx_CV, state_VK, de_CK, input_precision=PRECISION)
            r_CV = tl.load(r_ptr + at_token + at_CV, mask=live_CV, other=0.0)
            dk_CK = tl.dot(r_CV, dstate_VK, dk_CK, input_precision=PRECISION)

        keys_1K = (i_K < keys)[None, :]
        at_CK = i_C[:, None] * stride + i_K[None, :]
        live_CK = (i_C < tokens)[:, None] & keys_1K
        q_CK = tl.load(q_ptr + at_head + at_CK, mask=live_CK, other=0.0).to(tl.float32)
        k_CK = tl.load(k_ptr + at_head + at_CK, mask=live_CK, other=0.0).to(tl.float32)
        b_CK = tl.load(b_ptr + at_head + at_CK, mask=live_CK, other=0.0).to(tl.float32)
        e_CK = b_CK * k_CK

        # log2 of decays, as in `prepare`
        g_head_CK = tl.load(g_ptr + at_head + at_CK, mask=live_CK & (i_C % 16 > 0)[:, None], other=0.0) * LOG2_E
        next_CK = (i_C + 1 < tokens)[:, None] & keys_1K
        g_next_CK = tl.load(g_ptr + at_head + stride + at_CK, mask=next_CK, other=0.0) * LOG2_E
        g_first_K = tl.load(g_ptr + at_head + i_K, mask=i_K < keys, other=0.0) * LOG2_E
        head_CK = of_rows(tl.cumsum(in_blocks(g_head_CK), 1))
        reach_CK = of_rows(tl.cumsum(in_blocks(g_next_CK), 1, reverse=True))
        link_PK = tl.sum(in_blocks(g_next_CK), 1)
        to_head_CK, to_reach_CK = tl.exp2(head_CK), tl.exp2(reach_CK)

        # between the chunk and the states (10)
        gamma_CK = to_head_CK * to_rows(tl.exp2(along_blocks(link_PK, before_PP) + g_first_K[None, :]))
        tail_CK = to_reach_CK * to_rows(tl.exp2(along_blocks(link_PK, after_PP)))
        dq_CK, de_CK, dk_CK = gamma_CK * scale * dq_CK, -gamma_CK * de_CK, tail_CK * dk_CK
        ddecay_K = tl.sum(ddecay_KV, 1) * tl.exp2(tl.sum(link_PK, 0) + g_first_K)
        through_gamma_PK = tl.sum(in_blocks(q_CK * dq_CK + e_CK * de_CK), 1)
        dg_first_K = tl.sum(through_gamma_PK, 0) + ddecay_K
        dlink_PK = along_blocks(through_gamma_PK, after_PP) + ddecay_K[None, :]
        dlink_PK += along_blocks(tl.sum(in_blocks(k_CK * dk_CK), 1), before_PP)

        # between tokens (11): of neighbouring blocks, of halves, of a block
        here_CC = neighbours(i_C, 16)
        p_CC = tl.where(here_CC, dp_CC, 0.0)
        t_CC = tl.where(here_CC, dt_CC, 0.0)
        x_CK = tl.where(odd_C1, to_head_CK, to_reach_CK)
        dq, de, dk = pull(p_CC, t_CC, q_CK, e_CK, k_CK, x_CK, x_CK, operand, PRECISION)
        dq_CK += dq
        de_CK += de
        dk_CK += dk
        here_CC = (row_CC >= C // 2) & (column_CC < C // 2)
        p_CC = tl.where(here_CC, dp_CC, 0.0)
        t_CC = tl.where(here_CC, dt_CC, 0.0)
        x_CK = tl.where(late_C1, to_head_CK, to_reach_CK) * to_rows(tl.exp2(along_blocks(link_PK, middle_PP)))
        dq, de, dk = pull(p_CC, t_CC, q_CK, e_CK, k_CK, x_CK, x_CK, operand, PRECISION)
        dlink_PK += along_blocks(tl.sum(in_blocks(q_CK * dq + e_CK * de + k_CK * dk), 1), of_middle_PP)
        dq_CK += dq
        de_CK += de
        dk_CK += dk
        here_CC = (row_CC // 16 == column_CC // 16) & (row_CC >= column_CC)
        p_CC = tl.where(here_CC, dp_CC, 0.0)
        here_CC = here_CC & (row_CC > column_CC)
        t_CC = tl.where(here_CC, dt_CC, 0.0)
        wide = tl.min(head_CK) < -SPAN
        dk_inside_CK = tl.zeros([C, BK], tl.float32)
        if not wide:
            dq, de, dk = pull(p_CC, t_CC, q_CK, e_CK, k_CK, to_head_CK, tl.exp2(-head_CK), INSIDE, PRECISION)
            dq_CK += dq
            de_CK += de
            dk_inside_CK = dk

        # what the exponents get: `reach` and `link` belong to the g of the next token
        dhead_PRK = in_blocks(q_CK * dq_CK + e_CK * de_CK - k_CK * dk_inside_CK)
        dreach_PRK = in_blocks(k_CK * dk_CK)
        dg_PRK = tl.cumsum(dhead_PRK, 1, reverse=True) + (tl.cumsum(dreach_PRK, 1) - dreach_PRK) + dlink_PK[:, None, :]
        dg_start_PK = along_blocks(tl.sum(dreach_PRK, 1) + dlink_PK, behind_PP)
        dg_start_PK = tl.where((i_P == 0)[:, None], dg_first_K[None, :], dg_start_PK)
        dg_CK = tl.where((i_C % 16 == 0)[:, None], to_rows(dg_start_PK), of_rows(dg_PRK))
        tl.store(dg_ptr + at_head + at_CK, dg_CK, mask=live_CK)
        tl.store(dq_ptr + at_head + at_CK, dq_CK.to(operand), mask=live_CK)
        tl.store(dk_ptr + at_head + at_CK, (dk_CK + dk_inside_CK + de_CK * b_CK).to(operand), mask=live_CK)
        tl.store(db_ptr + at_head + at_CK, (de_CK * k_CK).to(operand), mask=live_CK)
        if wide:
            tl.debug_barrier()  # other threads read what was stored
            for i_p in tl.range(0, tl.cdiv(tokens, 16)):
                at_keys = at_head + i_p * 16 * stride
                at_values = ((first + i_p * 16) * HV + i_h * (HV // H)) * values
                add_pairwise(
                    q_ptr + at_keys,
                    k_ptr + at_keys,
                    g_ptr + at_keys,
                    b_ptr + at_keys,
                    do_ptr + at_values,
                    dx_ptr + at_values,
                    r_ptr + at_values,
                    dq_ptr + at_keys,
                    dk_ptr + at_keys,
                    dg_ptr + at_keys,
                    db_ptr + at_keys,
                    i_K,
                    keys,
                    values,
                    tokens - i_p * 16,
                    stride,
                    HV * values,
                    HV // H,
                    scale,
                    V,
                    BV,
                    PRECISION,
                )


GRADIENTS = Kernel(
    name="gradients",
    function=gradients_kernel,
    types=dict.fromkeys(("q", "k"), "*q")
    | {"g": "*fp32"}
    | dict.fromkeys(("b", "do", "dx", "r", "states", "dstates"), "*q")
    | {"cu_seqlens": "*i64"}
    | dict.fromkeys(("T", "H", "HV", "N", "key_size", "value_size"), "i32")
    | {"scale": "fp32", "dq": "*q", "dk": "*q", "dg": "*fp32", "db": "*q"},
    options={"PACKED": (0, 1), "MASKED": (0, 1)},
    grid="(slots * H, 1, 1)",
)
