"""`gradients`: dq, dk, dg, db of a group of chunks, once its states, R and dX are known, and dv, dw. Letters:
chunk_backward.py.

The mathematics on tiles is in pulls.py; here is what is read and what is written. Of a group of G chunks S before the
first and dS after the last are in memory: each chunk carries what it lacks over the others, S over those before it, dS
over those after it. Tokens of a block whose decays are too steep for one anchor owe each other what the pairwise
form says: it adds to the stored gradients, block by block, so that the registers it needs are not live beside the rest.

One program has a group's chunks one after the other: all that reads its R and dX. So dv and dw take their place.

Registers. What does not change from slice to slice the compiler makes once, and keeps: masks of a chunk by a chunk, and
what is left of dP and dT behind them, three times over, and where the tensors are. `unknown` is a zero that it cannot
see through; what is made of it is made anew in every slice. Without it the kernel spills.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gdn2_ops.kernels.chunk_forward import group
from gdn2_ops.kernels.kernel import Kernel
from gdn2_ops.kernels.prepare import locate
from gdn2_ops.kernels.pulls import add_pairwise, carriers, pull_chunk, pull_scores, pull_states, spans


@triton.jit
def other(i_c, i_other: tl.constexpr, group_tokens, C: tl.constexpr, G: tl.constexpr):
    """One of the G - 1 other chunks of a group, in the order in which states are carried over them: its distance in
    tokens, the tokens that it has, none or fewer where none is there, and whether S goes over it, or dS."""
    later = i_c > i_other
    i = tl.where(later, i_other, G - 1 - i_other + i_c)
    return (i - i_c) * C, tl.minimum(group_tokens - i * C, C), later


@triton.jit(do_not_specialize=["T", "H", "HV", "N", "key_size", "value_size"])
def gradients_kernel(
    # inputs
    q_ptr,
    k_ptr,
    g_ptr,
    b_ptr,
    v_ptr,
    w_ptr,
    do_ptr,
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
    # outputs; before, R is where dv will be and dX where dw will be
    dq_ptr,
    dk_ptr,
    dg_ptr,
    db_ptr,
    dv_ptr,
    dw_ptr,
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
    G: tl.constexpr = group(operand.primitive_bitwidth)
    SPAN: tl.constexpr = 4.0 if operand == tl.float32 else 100.0  # octaves; float32: more would cost digits
    i_group, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    first, group_tokens = locate(cu_seqlens_ptr, i_group, T, N, G * C, PACKED)
    first = first.to(tl.int32)
    if group_tokens <= 0:
        return
    keys, values = key_size if MASKED else K, value_size if MASKED else V
    heads, stride, value_stride = HV // H, H * keys, HV * values
    parts = heads * (V // BV)
    for i_chunk in tl.range(0, tl.cdiv(group_tokens, C), disable_licm=True):
        at = ((first + i_chunk * C).to(tl.int64) * HV + i_h * heads) * values
        dp_CC, dt_CC = pull_scores(
            *(do_ptr + at, dw_ptr + at, dv_ptr + at, tl.minimum(group_tokens - i_chunk * C, C)),
            *(value_stride, values, parts, scale, C, V, BV),
        )
        dp_CC, dt_CC = dp_CC.to(operand), dt_CC.to(tl.float32 if operand == tl.float16 else operand)
        for i_slice in tl.range(0, K // BK, disable_licm=True):
            unknown = tl.minimum(group_tokens, group_tokens + i_slice) - group_tokens
            i_c, i_C, i_K = i_chunk + unknown, tl.arange(0, C) + unknown, i_slice * BK + tl.arange(0, BK)
            program = tl.program_id(0) + unknown
            row = (first + i_c * C).to(tl.int64)
            at_keys = (row * H + program % H) * keys
            at_values = (row * HV + program % H * heads) * values
            at_states = ((program // H).to(tl.int64) * HV + program % H * heads) * keys * values
            do, dx, r = do_ptr + at_values, dw_ptr + at_values, dv_ptr + at_values
            tokens = tl.minimum(group_tokens - i_c * C, C)
            over = ()
            for i_other in tl.static_range(G - 1):
                to_other, other_tokens, later = other(i_c, i_other, group_tokens, C, G)
                at_other = at_keys + to_other * stride
                carrier = carriers(
                    *(q_ptr + at_other, k_ptr + at_other, g_ptr + at_other, b_ptr + at_other, i_C, i_K, keys),
                    *(other_tokens, stride, scale, later, operand),
                )
                over = over + ((to_other * value_stride, other_tokens, later, carrier),)  # type: ignore[assignment]
            dq_CK, de_CK, dk_CK, ddecay_K = pull_states(
                *(do, dx, r, states_ptr + at_states, dstates_ptr + at_states, over, i_C, i_K, keys),
                *(tokens, value_stride, values, parts, C, BK, V, BV, G),
            )
            at_CK = i_C[:, None] * stride + i_K[None, :]
            live_CK = (i_C < tokens)[:, None] & (i_K < keys)[None, :]
            q_CK = tl.load(q_ptr + at_keys + at_CK, mask=live_CK, other=0.0).to(tl.float32)
            k_CK = tl.load(k_ptr + at_keys + at_CK, mask=live_CK, other=0.0).to(tl.float32)
            b_CK = tl.load(b_ptr + at_keys + at_CK, mask=live_CK, other=0.0).to(tl.float32)
            head_CK, reach_CK, link_PK, first_K = spans(g_ptr + at_keys, i_C, i_K, keys, tokens, stride)
            steep = tl.min(head_CK) < -SPAN
            dq_CK, dk_CK, dg_CK, db_CK = pull_chunk(
                *(dp_CC, dt_CC, q_CK, k_CK, b_CK, dq_CK, de_CK, dk_CK, ddecay_K),
                *(head_CK, reach_CK, link_PK, first_K, scale, steep, i_C, operand),
            )
            tl.store(dg_ptr + at_keys + at_CK, dg_CK, mask=live_CK)
            tl.store(dq_ptr + at_keys + at_CK, dq_CK.to(operand), mask=live_CK)
            tl.store(dk_ptr + at_keys + at_CK, dk_CK.to(operand), mask=live_CK)
            tl.store(db_ptr + at_keys + at_CK, db_CK.to(operand), mask=live_CK)
            if steep:
                tl.debug_barrier()  # other threads read what was stored
                for i_p in tl.range(0, tl.cdiv(tokens, 16)):
                    below, left = i_p * 16 * value_stride, tokens - i_p * 16
                    dp_RR, dt_RR = pull_scores(
                        *(do + below, dx + below, r + below, left, value_stride, values, parts, scale, 16, V, BV)
                    )
                    at = at_keys + i_p * 16 * stride
                    add_pairwise(
                        *(q_ptr + at, k_ptr + at, g_ptr + at, b_ptr + at, dq_ptr + at, dk_ptr + at, dg_ptr + at),
                        *(db_ptr + at, dp_RR, dt_RR, i_K, keys, left, stride),
                    )

    tl.debug_barrier()  # other threads read R and dX
    # minimum(part, 0) is a zero like `unknown`: the head is found again, and not kept through all that stands above
    for part in tl.range(0, parts):
        i_V = part % (V // BV) * BV + tl.arange(0, BV)
        for i_chunk in tl.range(0, tl.cdiv(group_tokens, C)):
            i_C = i_chunk * C + tl.arange(0, C)
            at = (first.to(tl.int64) * HV + (tl.program_id(0) + tl.minimum(part, 0)) % H * heads) * values
            at_CV = i_C[:, None] * value_stride + (part // (V // BV) * values + i_V)[None, :]
            live_CV = (i_C < group_tokens)[:, None] & (i_V < values)[None, :]
            dx_CV = tl.load(dw_ptr + at + at_CV, mask=live_CV, other=0.0).to(tl.float32)
            w_CV = tl.load(w_ptr + at + at_CV, mask=live_CV, other=0.0).to(tl.float32)
            tl.store(dv_ptr + at + at_CV, (dx_CV * w_CV).to(operand), mask=live_CV)
            v_CV = tl.load(v_ptr + at + at_CV, mask=live_CV, other=0.0).to(tl.float32)
            tl.store(dw_ptr + at + at_CV, (dx_CV * v_CV).to(operand), mask=live_CV)


GRADIENTS = Kernel(
    name="gradients",
    function=gradients_kernel,
    types=dict.fromkeys(("q", "k"), "*q")
    | {"g": "*fp32"}
    | dict.fromkeys(("b", "v", "w", "do", "states", "dstates"), "*q")
    | {"cu_seqlens": "*i64"}
    | dict.fromkeys(("T", "H", "HV", "N", "key_size", "value_size"), "i32")
    | {"scale": "fp32", "dq": "*q", "dk": "*q", "dg": "*fp32"}
    | dict.fromkeys(("db", "dv", "dw"), "*q"),
    options={"PACKED": (0, 1), "MASKED": (0, 1)},
    grid="(groups * H, 1, 1)",
)
