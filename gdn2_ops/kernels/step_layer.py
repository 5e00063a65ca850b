"""One token of one Gated DeltaNet-2 layer, everything between its projections, in one kernel.

`step_layer_kernel`: one program per (row of the batch, key head), which walks the value heads of the key head and their
channels, BV at a time, with everything of the key head in registers:

    x <- causal convolution of the last W tokens, their window moves on by one
    q = l2(silu(x_q))    k = l2(silu(x_k))    v = silu(x_v)
    g = -exp(A_log) softplus(f + dt_bias)    b = erase_scale sigmoid(b)    w = sigmoid(w)
    o, S <- the step of step.py    y = o / sqrt(mean o^2 + norm_eps) norm gate(z)

A value head wider than BV is normalised in a second walk over the o that the first one left in y. It is what
gdn2_ops.layers.GatedDeltaNet2.step does between its projections and o_proj. Letters as in step.py; C = 2 H K + HV V
channels of the convolution, W its width (0: none). Both pools may be updated in place: what a program overwrites it has
read before a barrier, and no other program reads it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn2_ops.kernels.kernel import DTYPES, Kernel, expect, is_masked
from gdn2_ops.kernels.step import load, store, update


class LayerToken(NamedTuple):
    """What the projections of a layer give for one token: qkv [N, C], in that order, f and b [N, H * K], w and z
    [N, HV * V], z the output gate before its activation. One dtype of float32, bfloat16, float16."""

    qkv: Tensor
    f: Tensor
    b: Tensor
    w: Tensor
    z: Tensor


class LayerWeights(NamedTuple):
    """The weights between the projections, in the dtype of the token: convolution [C, W] or None, A_log [H],
    dt_bias [H * K], norm [V]."""

    convolution: Tensor | None
    A_log: Tensor
    dt_bias: Tensor
    norm: Tensor


@triton.jit(do_not_specialize=["H", "HV", "P", "key_size", "value_size"])
def step_layer_kernel(
    # inputs
    qkv_ptr,
    f_ptr,
    b_ptr,
    w_ptr,
    z_ptr,
    convolution_ptr,
    A_log_ptr,
    dt_bias_ptr,
    norm_ptr,
    window_ptr,
    state_ptr,
    slots_ptr,
    # sizes
    H,
    HV,
    P,
    key_size,
    value_size,
    scale,
    erase_scale,
    norm_eps,
    # outputs
    y_ptr,
    final_window_ptr,
    final_state_ptr,
    # constexprs
    K: tl.constexpr,
    V: tl.constexpr,
    W: tl.constexpr,
    SIGMOID: tl.constexpr,
    SLOTS: tl.constexpr,
    MASKED: tl.constexpr,
    BV: tl.constexpr,
):
    i_n, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    keys = key_size if MASKED else K
    values = value_size if MASKED else V
    i_K, i_BV = tl.arange(0, K), tl.arange(0, BV)
    live_K = i_K < keys
    groups = HV // H
    C = 2 * H * keys + HV * values

    slot = tl.load(slots_ptr + i_n).to(tl.int64) if SLOTS else i_n.to(tl.int64)
    outside = (slot < 0) | (slot >= P) if SLOTS else False
    if outside:
        for i_hv in range(i_h * groups, (i_h + 1) * groups):
            for at in range(0, V, BV):
                at_V = (i_n * HV + i_hv) * values + at + i_BV
                store(y_ptr + at_V, tl.full([BV], float("nan"), tl.float32), at + i_BV < values, MASKED)
        return

    at_K = i_h * keys + i_K
    x_ptr, at_row = qkv_ptr + i_n * C, slot * C
    q_K = convolve(x_ptr, convolution_ptr, window_ptr, final_window_ptr, at_row, at_K, live_K, W, MASKED)
    at_k = H * keys + at_K
    k_K = convolve(x_ptr, convolution_ptr, window_ptr, final_window_ptr, at_row, at_k, live_K, W, MASKED)
    q_K, k_K = l2_norm(q_K), l2_norm(k_K)
    rate = tl.exp(tl.load(A_log_ptr + i_h).to(tl.float32))
    step_K = load(f_ptr + i_n * H * keys + at_K, live_K, MASKED) + load(dt_bias_ptr + at_K, live_K, MASKED)
    a_K = tl.exp(-rate * softplus(step_K))
    b_K = erase_scale * tl.sigmoid(load(b_ptr + i_n * H * keys + at_K, live_K, MASKED))

    for i_hv in range(i_h * groups, (i_h + 1) * groups):
        squares = 0.0
        for at in range(0, V, BV):
            i_V = at + i_BV
            live_V = i_V < values
            at_v = 2 * H * keys + i_hv * values + i_V
            v_V = convolve(x_ptr, convolution_ptr, window_ptr, final_window_ptr, at_row, at_v, live_V, W, MASKED)
            at_V = (i_n * HV + i_hv) * values + i_V
            w_V = tl.sigmoid(load(w_ptr + at_V, live_V, MASKED))
            at_KV = ((slot * HV + i_hv) * keys + i_K[:, None]) * values + i_V[None, :]
            live_KV = live_K[:, None] & live_V[None, :]
            state_KV = load(state_ptr + at_KV, live_KV, MASKED)
            o_V, final_KV = update(q_K, k_K, a_K, b_K, w_V * v_V, state_KV, scale)
            store(final_state_ptr + at_KV, final_KV, live_KV, MASKED)
            squares += tl.sum(o_V * o_V, 0)
            if BV == V:
                y_V = o_V * tl.rsqrt(squares / values + norm_eps) * load(norm_ptr + i_V, live_V, MASKED)
                store(y_ptr + at_V, y_V * gate(load(z_ptr + at_V, live_V, MASKED), SIGMOID), live_V, MASKED)
            else:
                store(y_ptr + at_V, o_V, live_V, MASKED)
        if BV < V:
            tl.debug_barrier()
            for at in range(0, V, BV):
                i_V = at + i_BV
                live_V = i_V < values
                at_V = (i_n * HV + i_hv) * values + i_V
                o_V = load(y_ptr + at_V, live_V, MASKED)
                y_V = o_V * tl.rsqrt(squares / values + norm_eps) * load(norm_ptr + i_V, live_V, MASKED)
                y_V = y_V * gate(load(z_ptr + at_V, live_V, MASKED), SIGMOID)
                tl.debug_barrier()
                store(y_ptr + at_V, y_V, live_V, MASKED)


@triton.jit
def convolve(x_ptr, weight_ptr, window_ptr, final_ptr, at_row, at_N, live_N, W: tl.constexpr, MASKED: tl.constexpr):
    """silu of the causal convolution in the channels at_N, whose windows of W - 1 past tokens move on by one token."""
    x_N = load(x_ptr + at_N, live_N, MASKED)
    if W == 0:
        return x_N * tl.sigmoid(x_N)
    else:
        i_P = tl.arange(0, triton.next_power_of_2(W - 1))  # of the past
        live_NP = live_N[:, None] & (i_P < W - 1)[None, :]
        at_window_NP = (at_row + at_N)[:, None] * (W - 1) + i_P[None, :]
        past_NP = tl.load(window_ptr + at_window_NP, mask=live_NP, other=0.0)
        weight_NP = tl.load(weight_ptr + at_N[:, None] * W + i_P[None, :], mask=live_NP, other=0.0).to(tl.float32)
        y_N = tl.sum(past_NP.to(tl.float32) * weight_NP, 1)
        y_N += x_N * load(weight_ptr + at_N * W + (W - 1), live_N, MASKED)
        tl.debug_barrier()
        tl.store(final_ptr + at_window_NP - 1, past_NP, mask=live_NP & (i_P > 0)[None, :])
        store(final_ptr + (at_row + at_N) * (W - 1) + (W - 2), x_N, live_N, MASKED)
        return y_N * tl.sigmoid(y_N)


@triton.jit
def l2_norm(x_K):
    return x_K * tl.rsqrt(tl.sum(x_K * x_K, 0) + 1e-6)


@triton.jit
def softplus(x):
    """log(1 + e^x) with its digits where it is small: log(u) e / (u - 1) is log1p(e) though u = 1 + e is rounded."""
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def gate(z, SIGMOID: tl.constexpr):
    return tl.sigmoid(z) if SIGMOID else z * tl.sigmoid(z)


def _described(name: str, masked: int) -> Kernel:
    tokens = ("qkv", "f", "b", "w", "z", "convolution", "A_log", "dt_bias", "norm", "window")
    types = dict.fromkeys(tokens, "*q") | {"state": "*fp32", "slots": "*i64"}
    types |= dict.fromkeys(("H", "HV", "P", "key_size", "value_size"), "i32")
    types |= dict.fromkeys(("scale", "erase_scale", "norm_eps"), "fp32")
    return Kernel(
        name=name,
        function=step_layer_kernel,
        types=types | {"y": "*q", "final_window": "*q", "final_state": "*fp32"},
        options={"W": (4,), "SIGMOID": (0,), "SLOTS": (0, 1), "MASKED": (masked,)},
        grid="(N * H, 1, 1)",
    )


STEP_LAYER = (_described("step_layer", 0), _described("step_layer_masked", 1))
KERNELS = STEP_LAYER


def step_layer(
    token: LayerToken,
    weights: LayerWeights,
    window: Tensor | None,
    state: Tensor,
    *,
    slots: Tensor | None = None,
    scale: float | None = None,
    norm_eps: float = 1e-5,
    allow_neg_eigval: bool = False,
    guard_erase: bool = False,
    output_gate: str = "silu",
) -> Tensor:
    """One token of a `GatedDeltaNet2` layer between its projections; window and state are overwritten.

    Args:
        token, weights: see there.
        window: [P, C, W - 1], dtype of the token, contiguous: the last inputs of the convolution. None without one.
        state: [P, HV, K, V] float32, contiguous.
        slots: as `step_inplace`: row n of the token is row slots[n] of window and state. None is row n.
        scale: of the outputs. None is K ** -0.5.
        norm_eps, allow_neg_eigval, output_gate: of the layer.
        guard_erase: of the layer; True is refused, the kernel has no guard.

    Returns: y [N, HV * V], dtype of the token: the input of o_proj.
    Raises: ValueError, TypeError: an argument does not match the list above. NotImplementedError: guard_erase.
    Source: arXiv 2605.22791, section 3.
    """
    if guard_erase:
        raise NotImplementedError(
            "gdn2_ops.kernels.step_layer: expected a layer without guard_erase, got one with it; call the layer's step"
        )
    (_, HV, K, V), H = state.shape, weights.A_log.shape[0]
    _check(token, weights, window, state, slots, output_gate)
    width = 0 if weights.convolution is None else weights.convolution.shape[1]
    y = torch.empty_like(token.z)
    slots = None if slots is None else slots.contiguous()
    masked = is_masked(K, V)
    STEP_LAYER[masked].launch(
        (y.shape[0] * H,),
        state.device,
        y.dtype,
        K,
        V,
        *(*token, *weights, window, state, slots, H, HV, state.shape[0], K, V),
        *(K**-0.5 if scale is None else scale, 2.0 if allow_neg_eigval else 1.0, norm_eps),
        *(y, window, state),
        W=width,
        SIGMOID=int(output_gate == "sigmoid"),
        SLOTS=int(slots is not None),
        MASKED=masked,
    )
    return y


def _check(
    token: LayerToken,
    weights: LayerWeights,
    window: Tensor | None,
    state: Tensor,
    slots: Tensor | None,
    output_gate: str,
) -> None:
    N, device, one = token.qkv.shape[0], token.qkv.device, (token.qkv.dtype,)
    H, (P, HV, K, V) = weights.A_log.shape[0], state.shape
    C = 2 * H * K + HV * V
    if H < 1 or HV % H:
        raise ValueError(f"gdn2_ops.kernels.step_layer: expected HV to be a multiple of H = {H}, got {HV}")
    if output_gate not in ("silu", "sigmoid"):
        raise ValueError(f"gdn2_ops.kernels.step_layer: expected output_gate silu or sigmoid, got {output_gate!r}")
    if (window is None) != (weights.convolution is None):
        raise ValueError("gdn2_ops.kernels.step_layer: expected window and convolution weights, or neither")
    width = 1 if weights.convolution is None else weights.convolution.shape[-1]
    shapes = [(N, C), (N, H * K), (N, H * K), (N, HV * V), (N, HV * V), (C, width), (H,), (H * K,), (V,)]
    names = (*LayerToken._fields, *LayerWeights._fields)
    expect("step_layer", "qkv", token.qkv, (N, C), tuple(DTYPES), device)
    for name, x, shape in (*zip(names, (*token, *weights), shapes), ("window", window, (P, C, width - 1))):
        if x is not None:
            _expect(name, x, shape, one, device)
    _expect("state", state, (P, HV, K, V), (torch.float32,), device)
    if slots is not None:
        expect("step_layer", "slots", slots, (N,), (torch.int32, torch.int64), device)
    elif P != N:
        raise ValueError(f"gdn2_ops.kernels.step_layer: expected a state for each of {N} rows, got {P}; or pass slots")


def _expect(name: str, x: Tensor, shape: tuple, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    expect("step_layer", name, x, shape, dtypes, device)
    if not x.is_contiguous():
        raise ValueError(f"gdn2_ops.kernels.step_layer: expected contiguous {name}, got strides {x.stride()}")
