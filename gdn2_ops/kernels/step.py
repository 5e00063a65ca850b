"""One token of a state pool in one pass over the state.

With S the state before the token and a = exp(g), both reductions read S, so each number is loaded and stored once:

    r = S^T (a b k)    p = S^T (a q)    u = w v - r    o = scale (p + (q.k) u)    S <- a S + k u^T

`step_kernel`: one program per (row of the batch, value head, BV value channels), the tile [K, BV] in registers. A
program reads all of its tile before it writes any of it, so both states may be the same memory.

Letters: K V the compiled head sizes; key_size, value_size those of the call, smaller where MASKED. P rows of the pool.
With SLOTS row n of the batch is row slots[n] of both pools; a slot outside of the pool touches no state and its outputs
are NaN. States are float32, or bfloat16 by this launcher only: the operators keep float32 (custom_ops/contract.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn2_ops.kernels.kernel import DTYPES, Kernel, expect, is_masked


@triton.jit(do_not_specialize=["H", "HV", "P", "key_size", "value_size"])
def step_kernel(
    # inputs
    q_ptr,
    k_ptr,
    v_ptr,
    g_ptr,
    b_ptr,
    w_ptr,
    state_ptr,
    slots_ptr,
    # sizes
    H,
    HV,
    P,
    key_size,
    value_size,
    scale,
    # outputs
    o_ptr,
    final_state_ptr,
    # constexprs
    K: tl.constexpr,
    V: tl.constexpr,
    SLOTS: tl.constexpr,
    MASKED: tl.constexpr,
    BV: tl.constexpr,
):
    i_program = tl.program_id(0)
    i_head = i_program // (V // BV)  # of N * HV
    i_n, i_hv = i_head // HV, i_head % HV
    keys = key_size if MASKED else K
    values = value_size if MASKED else V
    i_K = tl.arange(0, K)
    i_V = (i_program % (V // BV)) * BV + tl.arange(0, BV)
    live_K, live_V = i_K < keys, i_V < values
    at_V = i_head * values + i_V

    slot = tl.load(slots_ptr + i_n).to(tl.int64) if SLOTS else i_n.to(tl.int64)
    outside = (slot < 0) | (slot >= P) if SLOTS else False
    if outside:
        store(o_ptr + at_V, tl.full([BV], float("nan"), tl.float32), live_V, MASKED)
        return

    at_K = (i_n * H + i_hv // (HV // H)) * keys + i_K
    q_K = load(q_ptr + at_K, live_K, MASKED)
    k_K = load(k_ptr + at_K, live_K, MASKED)
    b_K = load(b_ptr + at_K, live_K, MASKED)
    a_K = tl.exp(load(g_ptr + at_K, live_K, MASKED))
    wv_V = load(w_ptr + at_V, live_V, MASKED) * load(v_ptr + at_V, live_V, MASKED)
    at_state_KV = ((slot * HV + i_hv) * keys + i_K[:, None]) * values + i_V[None, :]
    live_KV = live_K[:, None] & live_V[None, :]
    state_KV = load(state_ptr + at_state_KV, live_KV, MASKED)

    o_V, final_KV = update(q_K, k_K, a_K, b_K, wv_V, state_KV, scale)
    store(o_ptr + at_V, o_V, live_V, MASKED)
    store(final_state_ptr + at_state_KV, final_KV, live_KV, MASKED)


@triton.jit
def update(q_K, k_K, a_K, b_K, wv_V, state_KV, scale):
    """The equations of this file: o and the new state of one head, or of some of its value channels."""
    # Joined: one reduction across warps in place of two, three barriers of eighteen less.
    both_KV2 = tl.join(state_KV * (a_K * b_K * k_K)[:, None], state_KV * (a_K * q_K)[:, None])
    r_V, p_V = tl.split(tl.sum(both_KV2, 0))
    u_V = wv_V - r_V
    o_V = scale * (p_V + tl.sum(q_K * k_K, 0) * u_V)
    return o_V, a_K[:, None] * state_KV + k_K[:, None] * u_V[None, :]


@triton.jit
def load(ptr, live, MASKED: tl.constexpr):
    """float32 of any dtype, zeros where dead. Without a mask nothing stands in the way of wide loads."""
    if MASKED:
        return tl.load(ptr, mask=live, other=0.0).to(tl.float32)
    else:
        return tl.load(ptr).to(tl.float32)


@triton.jit
def store(ptr, x, live, MASKED: tl.constexpr):
    """In the dtype of the pointer, where live."""
    if MASKED:
        tl.store(ptr, x.to(ptr.dtype.element_ty), mask=live)
    else:
        tl.store(ptr, x.to(ptr.dtype.element_ty))


def _described(name: str, state: str) -> Kernel:
    types = {"q": "*q", "k": "*q", "v": "*q", "g": "*fp32", "b": "*q", "w": "*q", "state": state, "slots": "*i64"}
    types |= dict.fromkeys(("H", "HV", "P", "key_size", "value_size"), "i32") | {"scale": "fp32"}
    return Kernel(
        name=name,
        function=step_kernel,
        types=types | {"o": "*q", "final_state": state},
        options={"SLOTS": (0, 1), "MASKED": (0, 1)},
        grid="(N * HV * V / BV, 1, 1)",
    )


STEP = {
    torch.float32: _described("step", "*fp32"),
    torch.bfloat16: _described("step_bf16_state", "*bf16"),
}
KERNELS = tuple(STEP.values())


def step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """`torch.ops.gdn2.step` on a GPU. state may be bfloat16 here, and the new one then is."""
    final_state = torch.empty_like(state, memory_format=torch.contiguous_format)
    return _launch((q, k, v, g, b, w), state.contiguous(), final_state, None, scale), final_state


def step_inplace(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    state: Tensor,
    slots: Tensor | None,
    scale: float,
) -> Tensor:
    """`torch.ops.gdn2.step_inplace` on a GPU. state [P, HV, K, V] may be bfloat16 here.

    The values of slots stay on the device and are not read here: a row of the batch whose slot is outside of the pool
    writes no state and has NaN for its outputs; which of two rows with the same slot comes last is not defined.
    """
    slots = None if slots is None else slots.contiguous()
    return _launch((q, k, v, g, b, w), state, state, slots, scale)


def _launch(
    token: tuple[Tensor, ...], state: Tensor, final_state: Tensor, slots: Tensor | None, scale: float
) -> Tensor:
    (N, H, K), (HV, V) = token[0].shape, token[2].shape[1:]
    _check(token, state, slots)
    q, k, v, g, b, w = (x.contiguous() for x in token)
    o = torch.empty_like(v)
    sizes = (H, HV, state.shape[0], K, V, scale)
    STEP[state.dtype].launch(
        lambda c: (N * HV * (c["V"] // c["BV"]),),
        q.device,
        q.dtype,
        K,
        V,
        *(q, k, v, g, b, w, state, slots, *sizes, o, final_state),
        SLOTS=int(slots is not None),
        MASKED=is_masked(K, V),
    )
    return o


def _check(token: tuple[Tensor, ...], state: Tensor, slots: Tensor | None) -> None:
    """What keeps the kernel inside its memory; custom_ops/contract.py says it in the caller's words before."""
    q, k, v, g, b, w = token
    (N, H, K), (HV, V) = q.shape, v.shape[1:]
    if H < 1 or HV % H:
        raise ValueError(f"gdn2_ops.kernels.step: expected HV to be a multiple of H = {H}, got {HV}")
    expect("step", "q", q, (N, H, K), tuple(DTYPES), q.device)
    for name, x in (("k", k), ("b", b)):
        expect("step", name, x, (N, H, K), (q.dtype,), q.device)
    for name, x in (("v", v), ("w", w)):
        expect("step", name, x, (N, HV, V), (q.dtype,), q.device)
    expect("step", "g", g, (N, H, K), (torch.float32,), q.device)
    expect("step", "state", state, (N if slots is None else state.shape[0], HV, K, V), tuple(STEP), q.device)
    if not state.is_contiguous():
        raise ValueError(f"gdn2_ops.kernels.step: expected a contiguous state, got strides {state.stride()}")
    if slots is not None:
        expect("step", "slots", slots, (N,), (torch.int32, torch.int64), q.device)
