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
from gdn2_ops.kernels.products import product


@triton.jit
def summed(a, b, acc, EXACT: tl.constexpr):
    """acc + a b of operands that may be rounded to the digits of q's dtype."""
    if EXACT:
        return product(a, b, acc, tl.float32)
    else:
        return tl.dot(a, b, acc, input_precision="tf32")


@triton.jit
def pull(dp_CC, dt_CC, q_CK, e_CK, k_CK, row_CK, column_CK, dtype: tl.constexpr, EXACT: tl.constexpr):
    """Gradients of q, e and k from those of P = (row q) (column k)^T and T = (row e) (column k)^T."""
    dp_CC, dt_CC = dp_CC.to(dtype), dt_CC.to(dtype)
    k_CK = (k_CK * column_CK).to(dtype)
    zero_CK = tl.zeros(k_CK.shape, tl.float32)
    dq_CK = row_CK * summed(dp_CC, k_CK, zero_CK, EXACT)
    dk_CK = summed(tl.trans(dp_CC), (q_CK * row_CK).to(dtype), zero_CK, EXACT)
    de_CK = row_CK * summed(dt_CC, k_CK, zero_CK, EXACT)
    dk_CK = summed(tl.trans(dt_CC), (e_CK * row_CK).to(dtype), dk_CK, EXACT)
    return dq_CK, de_CK, column_CK * dk_CK


@triton.jit
def pull_scores(
    do_ptr, dx_ptr, r_ptr, tokens, stride, values, parts, scale, C: tl.constexpr, V: tl.constexpr, BV: tl.constexpr
):
    """dP = scale tril(dO R^T) and dT = -tril(dX R^T, -1) of C tokens, over `parts` tiles of the group's values (9)."""
    PRECISION: tl.constexpr = "ieee" if r_ptr.dtype.element_ty == tl.float32 else "tf32"
    i_C = tl.arange(0, C)
    dp_CC, dt_CC = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for part in tl.range(0, parts):
        i_V = part % (V // BV) * BV + tl.arange(0, BV)
        at_CV = i_C[:, None] * stride + (part // (V // BV) * values + i_V)[None, :]
        live_CV = (i_C < tokens)[:, None] & (i_V < values)[None, :]
        r_VC = tl.trans(tl.load(r_ptr + at_CV, mask=live_CV, other=0.0))
        do_CV = tl.load(do_ptr + at_CV, mask=live_CV, other=0.0)
        dp_CC = tl.dot(do_CV, r_VC, dp_CC, input_precision=PRECISION)
        dx_CV = tl.load(dx_ptr + at_CV, mask=live_CV, other=0.0)
        dt_CC = tl.dot(dx_CV, r_VC, dt_CC, input_precision=PRECISION)
    dp_CC = tl.where(i_C[:, None] >= i_C[None, :], dp_CC * scale, 0.0)
    return dp_CC, tl.where(i_C[:, None] > i_C[None, :], -dt_CC, 0.0)


@triton.jit
def pull_states(
    do_ptr,
    dx_ptr,
    r_ptr,
    states_ptr,
    dstates_ptr,
    i_K,
    keys,
    tokens,
    stride,
    values,
    parts,
    C: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
):
    """dO S^T, -dX S^T and R dS^T for a slice of keys (10), and the sum of S dS over the values."""
    PRECISION: tl.constexpr = "ieee" if r_ptr.dtype.element_ty == tl.float32 else "tf32"
    BK: tl.constexpr = i_K.shape[0]
    i_C = tl.arange(0, C)
    dq_CK, de_CK = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    dk_CK, ddecay_KV = tl.zeros([C, BK], tl.float32), tl.zeros([BK, BV], tl.float32)
    for part in tl.range(0, parts):
        i_V = part % (V // BV) * BV + tl.arange(0, BV)
        at_CV = i_C[:, None] * stride + (part // (V // BV) * values + i_V)[None, :]
        live_CV = (i_C < tokens)[:, None] & (i_V < values)[None, :]
        at_KV = (part // (V // BV) * keys + i_K)[:, None] * values + i_V[None, :]
        live_KV = (i_K < keys)[:, None] & (i_V < values)[None, :]
        state_KV = tl.load(states_ptr + at_KV, mask=live_KV, other=0.0)
        dstate_KV = tl.load(dstates_ptr + at_KV, mask=live_KV, other=0.0)
        ddecay_KV += dstate_KV.to(tl.float32) * state_KV.to(tl.float32)
        do_CV = tl.load(do_ptr + at_CV, mask=live_CV, other=0.0)
        dq_CK = tl.dot(do_CV, tl.trans(state_KV), dq_CK, input_precision=PRECISION)
        dx_CV = tl.load(dx_ptr + at_CV, mask=live_CV, other=0.0)
        de_CK = tl.dot(dx_CV, tl.trans(state_KV), de_CK, input_precision=PRECISION)
        r_CV = tl.load(r_ptr + at_CV, mask=live_CV, other=0.0)
        dk_CK = tl.dot(r_CV, tl.trans(dstate_KV), dk_CK, input_precision=PRECISION)
    return dq_CK, -de_CK, dk_CK, tl.sum(ddecay_KV, 1)


@triton.jit
def in_blocks(x_CK):
    return tl.reshape(x_CK, [x_CK.shape[0] // 16, 16, x_CK.shape[1]])


@triton.jit
def of_rows(x_PRK):
    return tl.reshape(x_PRK, [x_PRK.shape[0] * 16, x_PRK.shape[2]])


@triton.jit
def to_rows(x_PK):
    """Row p for each of the block's 16 tokens."""
    return of_rows(tl.broadcast_to(x_PK[:, None, :], [x_PK.shape[0], 16, x_PK.shape[1]]))


@triton.jit
def pull_decays(dhead_CK, dreach_CK, dlink_PK, dfirst_K):
    """dg from the gradients of the logs of decays; `reach` and `link` belong to the g of the next token (13)."""
    i_P, i_C = tl.arange(0, dlink_PK.shape[0]), tl.arange(0, dhead_CK.shape[0])
    dhead_PRK, dreach_PRK = in_blocks(dhead_CK), in_blocks(dreach_CK)
    dg_PRK = tl.cumsum(dhead_PRK, 1, reverse=True) + (tl.cumsum(dreach_PRK, 1) - dreach_PRK) + dlink_PK[:, None, :]
    behind_PP = i_P[:, None] == i_P[None, :] + 1
    dg_first_PK = along_blocks(tl.sum(dreach_PRK, 1) + dlink_PK, behind_PP)
    dg_first_PK = tl.where((i_P == 0)[:, None], dfirst_K[None, :], dg_first_PK)
    return tl.where((i_C % 16 == 0)[:, None], to_rows(dg_first_PK), of_rows(dg_PRK))


@triton.jit
def add_pairwise(
    q_ptr,
    k_ptr,
    g_ptr,
    b_ptr,
    dq_ptr,
    dk_ptr,
    dg_ptr,
    db_ptr,
    dp_RR,
    dt_RR,
    i_K,
    keys,
    tokens,
    stride,
):
    """Adds what the tokens of a block of 16 owe each other, diagonal by diagonal, every decay a sum of its own."""
    operand: tl.constexpr = q_ptr.dtype.element_ty
    i_R, keys_1K = tl.arange(0, 16), (i_K < keys)[None, :]
    at_RK, live_RK = i_R[:, None] * stride + i_K[None, :], (i_R < tokens)[:, None] & keys_1K
    zero_RK = tl.zeros(at_RK.shape, tl.float32)
    dq_RK, de_RK, dk_RK = zero_RK, zero_RK, zero_RK
    to_row_RK, to_later_RK = zero_RK, zero_RK  # log2 of the decay from token i - d to i, from i to i + d
    for d in range(16):
        diagonal_RR = i_R[:, None] == i_R[None, :] + d
        dp_d_RR, dt_d_RR = tl.where(diagonal_RR, dp_RR, 0.0), tl.where(diagonal_RR, dt_RR, 0.0)
        earlier_RK = live_RK & (i_R >= d)[:, None]
        k_RK = tl.load(k_ptr + at_RK - d * stride, mask=earlier_RK, other=0.0).to(tl.float32) * tl.exp2(to_row_RK)
        dq_RK += tl.sum(dp_d_RR, 1)[:, None] * k_RK
        de_RK += tl.sum(dt_d_RR, 1)[:, None] * k_RK
        to_row_RK += tl.load(g_ptr + at_RK - d * stride, mask=earlier_RK, other=0.0) * LOG2_E
        later_RK = ((i_R + d < 16) & (i_R + d < tokens))[:, None] & keys_1K
        to_later_RK += tl.load(g_ptr + at_RK + d * stride, mask=later_RK & (d > 0), other=0.0) * LOG2_E
        q_RK = tl.load(q_ptr + at_RK + d * stride, mask=later_RK, other=0.0).to(tl.float32)
        e_RK = tl.load(k_ptr + at_RK + d * stride, mask=later_RK, other=0.0).to(tl.float32)
        e_RK *= tl.load(b_ptr + at_RK + d * stride, mask=later_RK, other=0.0).to(tl.float32)
        dk_RK += (tl.sum(dp_d_RR, 0)[:, None] * q_RK + tl.sum(dt_d_RR, 0)[:, None] * e_RK) * tl.exp2(to_later_RK)

    q_RK = tl.load(q_ptr + at_RK, mask=live_RK, other=0.0).to(tl.float32)
    k_RK = tl.load(k_ptr + at_RK, mask=live_RK, other=0.0).to(tl.float32)
    b_RK = tl.load(b_ptr + at_RK, mask=live_RK, other=0.0).to(tl.float32)
    dg_RK = tl.cumsum(q_RK * dq_RK + b_RK * k_RK * de_RK - k_RK * dk_RK, 0, reverse=True)
    dg_RK = tl.where((i_R > 0)[:, None], dg_RK, 0.0) + tl.load(dg_ptr + at_RK, mask=live_RK, other=0.0)
    dq_RK += tl.load(dq_ptr + at_RK, mask=live_RK, other=0.0).to(tl.float32)
    dk_RK += tl.load(dk_ptr + at_RK, mask=live_RK, other=0.0).to(tl.float32) + b_RK * de_RK
    db_RK = tl.load(db_ptr + at_RK, mask=live_RK, other=0.0).to(tl.float32) + k_RK * de_RK
    tl.debug_barrier()
    tl.store(dq_ptr + at_RK, dq_RK.to(operand), mask=live_RK)
    tl.store(dk_ptr + at_RK, dk_RK.to(operand), mask=live_RK)
    tl.store(dg_ptr + at_RK, dg_RK, mask=live_RK)
    tl.store(db_ptr + at_RK, db_RK.to(operand), mask=live_RK)


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
    INSIDE: tl.constexpr = tl.bfloat16 if operand == tl.bfloat16 else tl.float32  # 1 / gamma passes float16's range
    SPAN: tl.constexpr = 4.0 if EXACT else 100.0  # octaves; float32: more would cost digits of the exponent

    i_slot, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    first, tokens = locate(cu_seqlens_ptr, i_slot, T, N, C, PACKED)
    if tokens <= 0:
        return
    keys, values = key_size if MASKED else K, value_size if MASKED else V
    group, stride, value_stride = HV // H, H * keys, HV * values
    parts = group * (V // BV)
    at_keys = (first * H + i_h) * keys
    at_values = (first * HV + i_h * group) * values
    at_states = (i_slot.to(tl.int64) * HV + i_h * group) * keys * values

    i_C, i_P = tl.arange(0, C), tl.arange(0, C // 16)
    row_CC, column_CC = i_C[:, None], i_C[None, :]
    odd_C1, late_C1 = (i_C // 16 % 2 == 1)[:, None], (i_C >= C // 2)[:, None]
    before_PP, after_PP = i_P[:, None] > i_P[None, :], i_P[:, None] < i_P[None, :]
    middle_PP = ((i_P[:, None] == 0) & (i_P[None, :] == 1)) | ((i_P[:, None] == 3) & (i_P[None, :] == 2))
    of_middle_PP = ((i_P[:, None] == 1) & (i_P[None, :] == 0)) | ((i_P[:, None] == 2) & (i_P[None, :] == 3))
    near_CC, far_CC = neighbours(i_C, 16), (row_CC >= C // 2) & (column_CC < C // 2)
    inside_CC = row_CC // 16 == column_CC // 16
    dp_CC, dt_CC = pull_scores(
        do_ptr + at_values, dx_ptr + at_values, r_ptr + at_values, tokens, value_stride, values, parts, scale, C, V, BV
    )
    dp_CC, dt_CC = dp_CC.to(operand), dt_CC.to(operand)
    for i_slice in tl.range(0, K // BK, disable_licm=True):
        i_K = i_slice * BK + tl.arange(0, BK)
        dq_CK, de_CK, dk_CK, ddecay_K = pull_states(
            do_ptr + at_values,
            dx_ptr + at_values,
            r_ptr + at_values,
            states_ptr + at_states,
            dstates_ptr + at_states,
            i_K,
            keys,
            tokens,
            value_stride,
            values,
            parts,
            C,
            V,
            BV,
        )
        keys_1K = (i_K < keys)[None, :]
        at_CK = i_C[:, None] * stride + i_K[None, :]
        live_CK = (i_C < tokens)[:, None] & keys_1K
        q_CK = tl.load(q_ptr + at_keys + at_CK, mask=live_CK, other=0.0).to(tl.float32)
        k_CK = tl.load(k_ptr + at_keys + at_CK, mask=live_CK, other=0.0).to(tl.float32)
        b_CK = tl.load(b_ptr + at_keys + at_CK, mask=live_CK, other=0.0).to(tl.float32)
        e_CK = b_CK * k_CK

        # log2 of decays, as in `prepare`
        later_CK, next_CK = live_CK & (i_C % 16 > 0)[:, None], (i_C + 1 < tokens)[:, None] & keys_1K
        g_head_CK = tl.load(g_ptr + at_keys + at_CK, mask=later_CK, other=0.0) * LOG2_E
        g_next_CK = tl.load(g_ptr + at_keys + stride + at_CK, mask=next_CK, other=0.0) * LOG2_E
        g_first_K = tl.load(g_ptr + at_keys + i_K, mask=i_K < keys, other=0.0) * LOG2_E
        head_CK = of_rows(tl.cumsum(in_blocks(g_head_CK), 1))
        reach_CK = of_rows(tl.cumsum(in_blocks(g_next_CK), 1, reverse=True))
        link_PK = tl.sum(in_blocks(g_next_CK), 1)
        to_head_CK, to_reach_CK = tl.exp2(head_CK), tl.exp2(reach_CK)

        # between the chunk and the states (10)
        gamma_CK = to_head_CK * to_rows(tl.exp2(along_blocks(link_PK, before_PP) + g_first_K[None, :]))
        tail_CK = to_reach_CK * to_rows(tl.exp2(along_blocks(link_PK, after_PP)))
        dq_CK, de_CK, dk_CK = gamma_CK * scale * dq_CK, gamma_CK * de_CK, tail_CK * dk_CK
        ddecay_K *= tl.exp2(tl.sum(link_PK, 0) + g_first_K)
        dgamma_PK = tl.sum(in_blocks(q_CK * dq_CK + e_CK * de_CK), 1)
        dfirst_K = tl.sum(dgamma_PK, 0) + ddecay_K
        dlink_PK = along_blocks(dgamma_PK, after_PP) + ddecay_K[None, :]
        dlink_PK += along_blocks(tl.sum(in_blocks(k_CK * dk_CK), 1), before_PP)

        # between tokens (11): of a block, of neighbouring blocks, of halves
        # float32: true, but not known to be, so that masked copies for all slices do not fill the shared memory
        here = tokens > i_slice - K if EXACT else True
        in_dp_CC, in_dt_CC = tl.where(inside_CC & here, dp_CC, 0.0), tl.where(inside_CC & here, dt_CC, 0.0)
        steep = tl.min(head_CK) < -SPAN
        dk_inside_CK = tl.zeros([C, BK], tl.float32)
        if not steep:
            dq, de, dk_inside_CK = pull(
                in_dp_CC, in_dt_CC, q_CK, e_CK, k_CK, to_head_CK, tl.exp2(-head_CK), INSIDE, EXACT
            )
            dq_CK += dq
            de_CK += de
        near_dp_CC, near_dt_CC = tl.where(near_CC & here, dp_CC, 0.0), tl.where(near_CC & here, dt_CC, 0.0)
        x_CK = tl.where(odd_C1, to_head_CK, to_reach_CK)
        dq, de, dk = pull(near_dp_CC, near_dt_CC, q_CK, e_CK, k_CK, x_CK, x_CK, operand, EXACT)
        dq_CK += dq
        de_CK += de
        dk_CK += dk
        far_dp_CC, far_dt_CC = tl.where(far_CC & here, dp_CC, 0.0), tl.where(far_CC & here, dt_CC, 0.0)
        x_CK = tl.where(late_C1, to_head_CK, to_reach_CK) * to_rows(tl.exp2(along_blocks(link_PK, middle_PP)))
        dq, de, dk = pull(far_dp_CC, far_dt_CC, q_CK, e_CK, k_CK, x_CK, x_CK, operand, EXACT)
        dlink_PK += along_blocks(tl.sum(in_blocks(q_CK * dq + e_CK * de + k_CK * dk), 1), of_middle_PP)
        dq_CK += dq
        de_CK += de
        dk_CK += dk

        dhead_CK = q_CK * dq_CK + e_CK * de_CK - k_CK * dk_inside_CK
        dg_CK = pull_decays(dhead_CK, k_CK * dk_CK, dlink_PK, dfirst_K)
        tl.store(dg_ptr + at_keys + at_CK, dg_CK, mask=live_CK)
        tl.store(dq_ptr + at_keys + at_CK, dq_CK.to(operand), mask=live_CK)
        tl.store(dk_ptr + at_keys + at_CK, (dk_CK + dk_inside_CK + de_CK * b_CK).to(operand), mask=live_CK)
        tl.store(db_ptr + at_keys + at_CK, (de_CK * k_CK).to(operand), mask=live_CK)
        if steep:
            tl.debug_barrier()  # other threads read what was stored
            for i_p in tl.range(0, tl.cdiv(tokens, 16)):
                at_block, left = at_values + i_p * 16 * value_stride, tokens - i_p * 16
                dp_RR, dt_RR = pull_scores(
                    do_ptr + at_block,
                    dx_ptr + at_block,
                    r_ptr + at_block,
                    left,
                    value_stride,
                    values,
                    parts,
                    scale,
                    16,
                    V,
                    BV,
                )
                at_block = at_keys + i_p * 16 * stride
                add_pairwise(
                    q_ptr + at_block,
                    k_ptr + at_block,
                    g_ptr + at_block,
                    b_ptr + at_block,
                    dq_ptr + at_block,
                    dk_ptr + at_block,
                    dg_ptr + at_block,
                    db_ptr + at_block,
                    dp_RR,
                    dt_RR,
                    i_K,
                    keys,
                    left,
                    stride,
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
