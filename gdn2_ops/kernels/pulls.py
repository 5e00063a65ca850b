"""How gradients go back through the parts of a chunk: what `gradients` (gradients.py) is made of. Letters: there.

The decays of `prepare` are products of factors at most 1 (`head`, `reach`, `link` in prepare.py), and gradients go back
the same way: `pull` takes them through scores whose decay is a factor of the row times one of the column, and the
exponent of a factor hands its gradient to the tokens that it spans and to no others. Equation (13) subtracts sums over
the whole chunk instead, in which what was rounded to bfloat16 on one side only does not cancel.

A rounding of dT_ij is one of dg of all tokens between the two, and where keys are alike they add up. So dT is summed in
float64 for float32, and for float16 has two halves between the blocks (decision 0005); inside them one, in tf32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gdn2_ops.kernels.prepare import LOG2_E, along_blocks, neighbours
from gdn2_ops.kernels.products import halves, product


@triton.jit
def summed(a, b, acc, EXACT: tl.constexpr):
    """acc + a b of operands that may be rounded to the digits of q's dtype."""
    if EXACT:
        return product(a, b, acc, tl.float32)
    else:
        return tl.dot(a, b, acc, input_precision="tf32")


@triton.jit
def summed_finely(a, b, acc, EXACT: tl.constexpr):
    """As `summed`; where b is float16, of both halves of each number of a, which is float32."""
    if b.dtype == tl.float16:
        high, rest = halves(a, b.dtype)
        acc = summed(rest, b, acc, EXACT)
        return summed(high, b, acc, EXACT)
    else:
        return summed(a.to(b.dtype), b, acc, EXACT)


@triton.jit
def pull(dp_CC, dt_CC, q_CK, e_CK, k_CK, row_CK, column_CK, dtype: tl.constexpr, EXACT: tl.constexpr):
    """Gradients of q, e and k from those of P = (row q) (column k)^T and T = (row e) (column k)^T."""
    dp_CC = dp_CC.to(dtype)
    k_CK = (k_CK * column_CK).to(dtype)
    zero_CK = tl.zeros(k_CK.shape, tl.float32)
    de_CK = row_CK * summed_finely(dt_CC, k_CK, zero_CK, EXACT)
    dq_CK = row_CK * summed(dp_CC, k_CK, zero_CK, EXACT)
    dk_CK = summed(tl.trans(dp_CC), (q_CK * row_CK).to(dtype), zero_CK, EXACT)
    dk_CK = summed_finely(tl.trans(dt_CC), (e_CK * row_CK).to(dtype), dk_CK, EXACT)
    return dq_CK, de_CK, column_CK * dk_CK


@triton.jit
def scored(
    x_ptr, r_ptr, acc_CC, i_C, tokens, stride, values, parts, V: tl.constexpr, BV: tl.constexpr, EXACT: tl.constexpr
):
    """acc + x R^T over `parts` tiles of values."""
    dtype: tl.constexpr = acc_CC.dtype if EXACT else r_ptr.dtype.element_ty
    for part in tl.range(0, parts):
        i_V = part % (V // BV) * BV + tl.arange(0, BV)
        at_CV = i_C[:, None] * stride + (part // (V // BV) * values + i_V)[None, :]
        live_CV = (i_C < tokens)[:, None] & (i_V < values)[None, :]
        r_VC = tl.trans(tl.load(r_ptr + at_CV, mask=live_CV, other=0.0))
        x_CV = tl.load(x_ptr + at_CV, mask=live_CV, other=0.0)
        acc_CC = summed(x_CV.to(dtype), r_VC.to(dtype), acc_CC, EXACT)
    return acc_CC


@triton.jit
def pull_scores(
    do_ptr, dx_ptr, r_ptr, tokens, stride, values, parts, scale, C: tl.constexpr, V: tl.constexpr, BV: tl.constexpr
):
    """dP = scale tril(dO R^T) and dT = -tril(dX R^T, -1) of C tokens, over `parts` tiles of the group's values (9)."""
    EXACT: tl.constexpr = r_ptr.dtype.element_ty == tl.float32
    i_C = tl.arange(0, C)
    zero_CC = tl.zeros([C, C], tl.float32)
    dp_CC = scored(do_ptr, r_ptr, zero_CC, i_C, tokens, stride, values, parts, V, BV, EXACT)
    wide_zero_CC = tl.zeros([C, C], tl.float64 if EXACT else tl.float32)
    dt_CC = scored(dx_ptr, r_ptr, wide_zero_CC, i_C, tokens, stride, values, parts, V, BV, EXACT).to(tl.float32)
    dp_CC = tl.where(i_C[:, None] >= i_C[None, :], dp_CC * scale, 0.0)
    return dp_CC, tl.where(i_C[:, None] > i_C[None, :], -dt_CC, 0.0)


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
def spans(g_ptr, i_C, i_K, keys, tokens, stride):
    """log2 of the decays of a slice of keys, as in `prepare`: head_CK, reach_CK, link_PK and the first token's."""
    keys_K = i_K < keys
    at_CK = i_C[:, None] * stride + i_K[None, :]
    later_CK = ((i_C < tokens) & (i_C % 16 > 0))[:, None] & keys_K[None, :]
    next_CK = (i_C + 1 < tokens)[:, None] & keys_K[None, :]
    g_head_CK = tl.load(g_ptr + at_CK, mask=later_CK, other=0.0) * LOG2_E
    g_next_CK = tl.load(g_ptr + stride + at_CK, mask=next_CK, other=0.0) * LOG2_E
    g_first_K = tl.load(g_ptr + i_K, mask=keys_K & (tokens > 0), other=0.0) * LOG2_E
    head_CK = of_rows(tl.cumsum(in_blocks(g_head_CK), 1))
    reach_CK = of_rows(tl.cumsum(in_blocks(g_next_CK), 1, reverse=True))
    return head_CK, reach_CK, tl.sum(in_blocks(g_next_CK), 1), g_first_K


@triton.jit
def from_start(to_head_CK, link_PK, first_K):
    """The decay from before the chunk to each token."""
    i_P = tl.arange(0, link_PK.shape[0])
    return to_head_CK * to_rows(tl.exp2(along_blocks(link_PK, i_P[:, None] > i_P[None, :]) + first_K[None, :]))


@triton.jit
def to_end(to_reach_CK, link_PK):
    """The decay from each token to the end of the chunk."""
    i_P = tl.arange(0, link_PK.shape[0])
    return to_reach_CK * to_rows(tl.exp2(along_blocks(link_PK, i_P[:, None] < i_P[None, :])))


@triton.jit
def carriers(q_ptr, k_ptr, g_ptr, b_ptr, i_C, i_K, keys, tokens, stride, scale, later, dtype: tl.constexpr):
    """What carries a slice of a state over a chunk of `tokens`: its decay; then Kt and nothing for S, which goes on to
    a later chunk, or Qd and -E for dS, which goes back to an earlier one."""
    at_CK, live_CK = i_C[:, None] * stride + i_K[None, :], (i_C < tokens)[:, None] & (i_K < keys)[None, :]
    head_CK, reach_CK, link_PK, first_K = spans(g_ptr, i_C, i_K, keys, tokens, stride)
    k_CK = tl.load(k_ptr + at_CK, mask=live_CK, other=0.0).to(tl.float32)
    if later:
        x_CK = (k_CK * to_end(tl.exp2(reach_CK), link_PK)).to(dtype)
        y_CK = tl.zeros(x_CK.shape, dtype)
    else:
        gamma_CK = from_start(tl.exp2(head_CK), link_PK, first_K)
        x_CK = (tl.load(q_ptr + at_CK, mask=live_CK, other=0.0).to(tl.float32) * scale * gamma_CK).to(dtype)
        e_CK = tl.load(b_ptr + at_CK, mask=live_CK, other=0.0).to(tl.float32) * k_CK
        y_CK = (-e_CK * gamma_CK).to(dtype)
    return tl.exp2(tl.sum(link_PK, 0) + first_K), x_CK, y_CK


@triton.jit
def carry(
    state_KV,
    dstate_KV,
    do_ptr,
    dx_ptr,
    r_ptr,
    at_CV,
    i_C,
    i_V,
    carrier,
    tokens,
    later,
    values,
):
    """S, for a later chunk, or dS, for an earlier one, over the chunk at at_CV; the other one as it is."""
    carry_K, x_CK, y_CK = carrier
    operand: tl.constexpr = r_ptr.dtype.element_ty
    EXACT: tl.constexpr = operand == tl.float32
    live_CV = (i_C < tokens)[:, None] & (i_V < values)[None, :]
    if later:
        r_CV = tl.load(r_ptr + at_CV, mask=live_CV, other=0.0)
        state_KV = summed(tl.trans(x_CK), r_CV, state_KV.to(tl.float32) * carry_K[:, None], EXACT).to(operand)
    else:
        do_CV = tl.load(do_ptr + at_CV, mask=live_CV, other=0.0)
        dx_CV = tl.load(dx_ptr + at_CV, mask=live_CV, other=0.0)
        before_KV = summed(tl.trans(x_CK), do_CV, dstate_KV.to(tl.float32) * carry_K[:, None], EXACT)
        dstate_KV = summed(tl.trans(y_CK), dx_CV, before_KV, EXACT).to(operand)
    return state_KV, dstate_KV


@triton.jit
def pull_states(
    do_ptr,
    dx_ptr,
    r_ptr,
    states_ptr,
    dstates_ptr,
    over,
    i_C,
    i_K,
    keys,
    tokens,
    stride,
    values,
    parts,
    C: tl.constexpr,
    BK: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    G: tl.constexpr,
):
    """dO S^T, -dX S^T and R dS^T for a slice of keys (10), and the sum of S dS over the values.

    Of a group of chunks S before the first and dS after the last are in memory; both come to this chunk over the G - 1
    others. over: of each of those how many numbers away it is, its tokens, whether it is S that goes over it, and
    `carriers`.
    """
    operand: tl.constexpr = r_ptr.dtype.element_ty
    EXACT: tl.constexpr = operand == tl.float32
    zero_CK = tl.zeros([C, BK], tl.float32)
    dq_CK, de_CK, dk_CK, ddecay_KV = zero_CK, zero_CK, zero_CK, tl.zeros([BK, BV], tl.float32)
    for part in tl.range(0, parts):
        i_V = part % (V // BV) * BV + tl.arange(0, BV)
        at_CV = i_C[:, None] * stride + (part // (V // BV) * values + i_V)[None, :]
        live_CV = (i_C < tokens)[:, None] & (i_V < values)[None, :]
        at_KV = (part // (V // BV) * keys + i_K)[:, None] * values + i_V[None, :]
        live_KV = (i_K < keys)[:, None] & (i_V < values)[None, :]
        state_KV = tl.load(states_ptr + at_KV, mask=live_KV, other=0.0)
        dstate_KV = tl.load(dstates_ptr + at_KV, mask=live_KV, other=0.0)
        for i_other in tl.static_range(G - 1):
            to_other, other_tokens, later, carrier = over[i_other]
            state_KV, dstate_KV = carry(
                *(state_KV, dstate_KV, do_ptr, dx_ptr, r_ptr, to_other + at_CV, i_C, i_V),
                *(carrier, other_tokens, later, values),
            )
        ddecay_KV += dstate_KV.to(tl.float32) * state_KV.to(tl.float32)
        do_CV = tl.load(do_ptr + at_CV, mask=live_CV, other=0.0)
        dq_CK = summed(do_CV, tl.trans(state_KV), dq_CK, EXACT)
        dx_CV = tl.load(dx_ptr + at_CV, mask=live_CV, other=0.0)
        de_CK = summed(dx_CV, tl.trans(state_KV), de_CK, EXACT)
        r_CV = tl.load(r_ptr + at_CV, mask=live_CV, other=0.0)
        dk_CK = summed(r_CV, tl.trans(dstate_KV), dk_CK, EXACT)
    return dq_CK, -de_CK, dk_CK, tl.sum(ddecay_KV, 1)


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
def pull_chunk(
    dp_CC,
    dt_CC,
    q_CK,
    k_CK,
    b_CK,
    dq_CK,
    de_CK,
    dk_CK,
    ddecay_K,
    head_CK,
    reach_CK,
    link_PK,
    first_K,
    scale,
    steep,
    i_C,
    dtype: tl.constexpr,
):
    """dq, dk, dg and db of a slice of keys, without what tokens of a block owe each other where that is `steep`.

    dq_CK, de_CK, dk_CK and ddecay_K: of `pull_states`. Between the chunk and the states (10), then between tokens (11).
    """
    EXACT: tl.constexpr = dtype == tl.float32
    INSIDE: tl.constexpr = tl.bfloat16 if dtype == tl.bfloat16 else tl.float32  # 1 / gamma passes float16's range
    C: tl.constexpr = q_CK.shape[0]
    i_P = tl.arange(0, C // 16)
    before_PP, after_PP = i_P[:, None] > i_P[None, :], i_P[:, None] < i_P[None, :]
    middle_PP = ((i_P[:, None] == 0) & (i_P[None, :] == 1)) | ((i_P[:, None] == 3) & (i_P[None, :] == 2))
    of_middle_PP = ((i_P[:, None] == 1) & (i_P[None, :] == 0)) | ((i_P[:, None] == 2) & (i_P[None, :] == 3))
    inside_CC, near_CC = i_C[:, None] // 16 == i_C[None, :] // 16, neighbours(i_C, 16)
    far_CC = (i_C >= C // 2)[:, None] & (i_C < C // 2)[None, :]
    odd_C1, late_C1 = (i_C // 16 % 2 == 1)[:, None], (i_C >= C // 2)[:, None]
    e_CK, to_head_CK, to_reach_CK = b_CK * k_CK, tl.exp2(head_CK), tl.exp2(reach_CK)

    gamma_CK = from_start(to_head_CK, link_PK, first_K)
    dq_CK, de_CK, dk_CK = gamma_CK * scale * dq_CK, gamma_CK * de_CK, to_end(to_reach_CK, link_PK) * dk_CK
    ddecay_K *= tl.exp2(tl.sum(link_PK, 0) + first_K)
    dgamma_PK = tl.sum(in_blocks(q_CK * dq_CK + e_CK * de_CK), 1)
    dfirst_K = tl.sum(dgamma_PK, 0) + ddecay_K
    dlink_PK = along_blocks(dgamma_PK, after_PP) + ddecay_K[None, :]
    dlink_PK += along_blocks(tl.sum(in_blocks(k_CK * dk_CK), 1), before_PP)

    dk_inside_CK = tl.zeros(k_CK.shape, tl.float32)
    if not steep:
        in_dp_CC, in_dt_CC = tl.where(inside_CC, dp_CC, 0.0), tl.where(inside_CC, dt_CC.to(dtype), 0.0)
        dq, de, dk_inside_CK = pull(in_dp_CC, in_dt_CC, q_CK, e_CK, k_CK, to_head_CK, tl.exp2(-head_CK), INSIDE, EXACT)
        dq_CK += dq
        de_CK += de
    near_dp_CC, near_dt_CC = tl.where(near_CC, dp_CC, 0.0), tl.where(near_CC, dt_CC, 0.0)
    x_CK = tl.where(odd_C1, to_head_CK, to_reach_CK)
    dq, de, dk = pull(near_dp_CC, near_dt_CC, q_CK, e_CK, k_CK, x_CK, x_CK, dtype, EXACT)
    dq_CK += dq
    de_CK += de
    dk_CK += dk
    far_dp_CC, far_dt_CC = tl.where(far_CC, dp_CC, 0.0), tl.where(far_CC, dt_CC, 0.0)
    x_CK = tl.where(late_C1, to_head_CK, to_reach_CK) * to_rows(tl.exp2(along_blocks(link_PK, middle_PP)))
    dq, de, dk = pull(far_dp_CC, far_dt_CC, q_CK, e_CK, k_CK, x_CK, x_CK, dtype, EXACT)
    dlink_PK += along_blocks(tl.sum(in_blocks(q_CK * dq + e_CK * de + k_CK * dk), 1), of_middle_PP)
    dq_CK += dq
    de_CK += de
    dk_CK += dk

    dhead_CK = q_CK * dq_CK + e_CK * de_CK - k_CK * dk_inside_CK
    dg_CK = pull_decays(dhead_CK, k_CK * dk_CK, dlink_PK, dfirst_K)
    return dq_CK, dk_CK + dk_inside_CK + de_CK * b_CK, dg_CK, de_CK * k_CK


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
