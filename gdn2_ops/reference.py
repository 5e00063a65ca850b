"""The specification: Gated DeltaNet-2 twice, in plain PyTorch, for any device and floating dtype.

    S_t = (I - k_t (b_t*k_t)^T) Diag(exp g_t) S_{t-1} + k_t (w_t*v_t)^T        o_t = scale S_t^T q_t            (1)

`recurrent` is equation (1) token by token: the definition that everything else is measured against.
`chunkwise` is the same map in blocks of tokens, equations (3)-(8), and `chunkwise_backward` its explicit
vector-Jacobian product, equations (9)-(13). Equation numbers are those of docs/derivation.md; the source is
arXiv 2605.22791, section 3 and appendices A-D. Arithmetic is float64 for float64 inputs, else float32;
sums of log decays are float64 always.

Columns of a state never meet, so a group of HV/H value heads sharing one key head is one head whose values are
HV/H times as wide (2). Inside this file values and states have that width, W = V HV / H.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Equation (1), one token after another. Shapes and meaning as `gdn2_ops.chunk`; differentiable by autograd.

    Returns: o [B, T, HV, V] in the dtype of q; final state [N, HV, K, V], float32 (float64 for float64 inputs).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tensors, state_NHKW = _fold(q, k, v, g, b, w, state, cu_seqlens)
    outs, states = [], []
    for (q_, k_, v_, g_, b_, w_), (S,) in _problems(tensors, (state_NHKW,), cu_seqlens):
        outs.append(v_[:, :, :0])
        for t in range(v_.shape[2]):
            decayed = g_[:, :, t, :, None].exp() * S
            erased_BH1W = (b_ * k_)[:, :, t, None, :] @ decayed
            write_BH1W = (w_ * v_)[:, :, t, None, :] - erased_BH1W
            S = decayed + k_[:, :, t, :, None] * write_BH1W
            outs.append(scale * (q_[:, :, t, None, :] @ S))
        states.append(S)
    return _unfold_values(torch.cat(outs, 2), v).to(q.dtype), _unfold_state(torch.cat(states), v)


def step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor, state: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One token of `recurrent`: q, k, g, b [B, H, K], v, w [B, HV, V], state [B, HV, K, V] -> (o [B, HV, V], state)."""
    q, k, v, g, b, w = (x.unsqueeze(1) for x in (q, k, v, g, b, w))
    o_B1HV, final = recurrent(q, k, v, g, b, w, state, scale=scale)
    return o_B1HV.squeeze(1), final


def chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Equations (3)-(8): `recurrent` in chunks of `chunk_size` tokens. Same arguments, same result, differentiable."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tensors, state_NHKW = _fold(q, k, v, g, b, w, state, cu_seqlens)
    outs, states = [], []
    for rows, (S,) in _problems(tensors, (state_NHKW,), cu_seqlens):
        outs.append(rows[2][:, :, :0])
        for q_, k_, v_, g_, b_, w_ in _chunks(rows, chunk_size):
            c = _scores(q_, k_, g_, b_, scale)
            R = _solve(c.T_CC, w_ * v_ - (c.gamma_CK * b_ * k_) @ S)
            outs.append(scale * (c.gamma_CK * q_) @ S + c.Aqk_CC @ R)
            S = c.gamma_CK[..., -1, :, None] * S + (c.tail_CK * k_).mT @ R
        states.append(S)
    return _unfold_values(torch.cat(outs, 2), v).to(q.dtype), _unfold_state(torch.cat(states), v)


def chunkwise_backward(
    do: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Equations (9)-(13): gradients of `chunkwise` from do [B, T, HV, V] and dstate [N, HV, K, V] (None is zero).

    Recomputes the chunks and keeps one state per chunk. Returns: dq, dk, dv, dg, db, dw in the shapes and dtypes of
    their inputs, and the gradient of the initial state [N, HV, K, V].
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rows, state_NHKW = _fold(q, k, v, g, b, w, state, cu_seqlens)
    dS_NHKW = torch.zeros_like(state_NHKW) if dstate is None else _fold_state(dstate.to(state_NHKW.dtype), q.shape[2])
    do_BHTW = _fold_values(do.to(state_NHKW.dtype), q.shape[2])
    parts: list[list[Tensor]] = [[] for _ in rows]
    dstates = []
    for (*rows_n, do_n), (S, dS) in _problems((*rows, do_BHTW), (state_NHKW, dS_NHKW), cu_seqlens):
        for part, x in zip(parts, rows_n):
            part.append(x[:, :, :0])
        grads, dS = _backward_one_sequence(tuple(rows_n), do_n, S, dS, scale, chunk_size)
        for part, grad in zip(parts, grads):
            part.extend(grad)
        dstates.append(dS)
    dq, dk, dv, dg, db, dw = (torch.cat(part, 2) for part in parts)
    over_keys = (dq.transpose(1, 2), dk.transpose(1, 2), dg.transpose(1, 2), db.transpose(1, 2))
    dq, dk, dg, db = (x.to(y.dtype).contiguous() for x, y in zip(over_keys, (q, k, g, b)))
    dv, dw = (_unfold_values(x, v).to(y.dtype) for x, y in ((dv, v), (dw, w)))
    return dq, dk, dv, dg, db, dw, _unfold_state(torch.cat(dstates), v)


class _Scores(NamedTuple):
    """What the tokens of one chunk do to each other, equations (3) and (4); no state in it."""

    gamma_CK: Tensor
    tail_CK: Tensor
    D_CCK: Tensor
    T_CC: Tensor
    Aqk_CC: Tensor


def _scores(q: Tensor, k: Tensor, g: Tensor, b: Tensor, scale: float) -> _Scores:
    # float64: a reset of -30 in a float32 sum takes digits that the spans after it need.
    G_CK = g.double().cumsum(-2)
    future_CC = torch.ones(2 * g.shape[-2:-1], dtype=torch.bool, device=g.device).triu(1)
    span_CCK = (G_CK[..., :, None, :] - G_CK[..., None, :, :]).to(g.dtype)
    # Masked before exp: a masked exp of a positive span is inf, and its gradient NaN.
    D_CCK = span_CCK.masked_fill(future_CC[..., None], -torch.inf).exp()
    against_CK2 = torch.stack((b * k, scale * q), -1)
    T_CC, Aqk_CC = ((D_CCK * k[..., None, :, :]) @ against_CK2).unbind(-1)
    tail_CK = (G_CK[..., -1:, :] - G_CK).to(g.dtype).exp()
    return _Scores(G_CK.to(g.dtype).exp(), tail_CK, D_CCK, T_CC.tril(-1), Aqk_CC)


def _solve(T_CC: Tensor, X: Tensor) -> Tensor:
    """(I + T)^-1 X by substitution: a Neumann series diverges on correlated keys (6)."""
    return torch.linalg.solve_triangular(T_CC, X, upper=False, unitriangular=True)


def _backward_one_sequence(
    rows: tuple[Tensor, ...], do: Tensor, S: Tensor, dS: Tensor, scale: float, chunk_size: int
) -> tuple[list[list[Tensor]], Tensor]:
    """Gradients of the six inputs as lists over chunks, and of the initial state."""
    forward = []
    for q, k, v, g, b, w in _chunks(rows, chunk_size):
        c = _scores(q, k, g, b, scale)
        R = _solve(c.T_CC, w * v - (c.gamma_CK * b * k) @ S)
        forward.append((c, S, R))
        S = c.gamma_CK[..., -1, :, None] * S + (c.tail_CK * k).mT @ R
    grads: list[list[Tensor]] = [[] for _ in rows]
    chunks = list(zip(_chunks(rows, chunk_size), do.split(chunk_size, 2), forward))
    for inputs, do_c, (c, S0, R) in reversed(chunks):
        chunk_grads, dS = _backward_one_chunk(inputs, do_c, dS, c, S0, R, scale)
        for grad, x in zip(grads, chunk_grads):
            grad.insert(0, x)
    return grads, dS


def _backward_one_chunk(
    inputs: tuple[Tensor, ...], do: Tensor, dS: Tensor, c: _Scores, S0: Tensor, R: Tensor, scale: float
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Equations (9)-(13); dS is the gradient of the state after the chunk, the one returned of the state before it."""
    q, k, v, _, b, w = inputs
    gamma_last_K1 = c.gamma_CK[..., -1, :, None]
    E_CK = c.gamma_CK * b * k
    # (9) through the solve
    dR = c.Aqk_CC.mT @ do + (c.tail_CK * k) @ dS
    dX = torch.linalg.solve_triangular(c.T_CC.mT, dR, upper=True, unitriangular=True)
    dT_CC = -(dX @ R.mT).tril(-1)
    dAqk_CC = scale * (do @ R.mT).tril()
    # (10) between the chunk and the state
    dE_CK = -dX @ S0.mT
    dq_state = scale * c.gamma_CK * (do @ S0.mT)
    dk_tail = c.tail_CK * (R @ dS.mT)
    dS0 = scale * (c.gamma_CK * q).mT @ do + gamma_last_K1 * dS - E_CK.mT @ dX
    # (11) between tokens of the chunk
    dq_local = (dAqk_CC[..., None, :] @ (c.D_CCK * k[..., None, :, :])).squeeze(-2)
    de_local = (dT_CC[..., None, :] @ (c.D_CCK * k[..., None, :, :])).squeeze(-2)
    rows_CCK = dAqk_CC[..., None] * q[..., :, None, :] + dT_CC[..., None] * (b * k)[..., :, None, :]
    dk_local = (rows_CCK * c.D_CCK).sum(-3)
    # (12) the inputs
    de = c.gamma_CK * dE_CK + de_local
    dq = dq_state + dq_local
    dk = dk_tail + dk_local + b * de
    # (13) the decay: every product above with the exponent it carries
    dG_CK = q * dq + (b * k) * de - k * (dk_tail + dk_local)
    last_K = (k * dk_tail).sum(-2) + (gamma_last_K1 * dS * S0).sum(-1)
    dg = dG_CK.flip(-2).cumsum(-2).flip(-2) + last_K[..., None, :]
    return (dq, dk, dX * w, dg, k * de, dX * v), dS0


def _fold(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Heads first and groups folded into the width: q, k, g, b [B, H, T, K], v, w [B, H, T, W], state [N, H, K, W]."""
    B, _, H, K = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v, g, b, w = (x.to(dtype) for x in (q, k, v, g, b, w))
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = v.new_zeros(N, v.shape[2], K, v.shape[3]) if state is None else state.to(dtype)
    keys = [x.transpose(1, 2) for x in (q, k, g, b)]
    rows = (keys[0], keys[1], _fold_values(v, H), keys[2], keys[3], _fold_values(w, H))
    return rows, _fold_state(state, H)


def _fold_values(v: Tensor, H: int) -> Tensor:
    B, T, HV, V = v.shape
    return v.reshape(B, T, H, HV // H * V).transpose(1, 2)


def _unfold_values(v_BHTW: Tensor, like: Tensor) -> Tensor:
    return v_BHTW.transpose(1, 2).reshape(like.shape).contiguous()


def _fold_state(state: Tensor, H: int) -> Tensor:
    N, HV, K, V = state.shape
    return state.reshape(N, H, HV // H, K, V).transpose(2, 3).reshape(N, H, K, HV // H * V)


def _unfold_state(state_NHKW: Tensor, v: Tensor) -> Tensor:
    N, H, K, _ = state_NHKW.shape
    HV, V = v.shape[2:]
    return state_NHKW.reshape(N, H, K, HV // H, V).transpose(2, 3).reshape(N, HV, K, V).contiguous()


def _problems(
    rows: tuple[Tensor, ...], states: tuple[Tensor, ...], cu_seqlens: Tensor | None
) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """The whole batch at once, or one packed sequence after another."""
    if cu_seqlens is None:
        yield rows, states
        return
    bounds = cu_seqlens.tolist()
    for n, (begin, end) in enumerate(pairwise(bounds)):
        yield tuple(x[:, :, begin:end] for x in rows), tuple(x[n : n + 1] for x in states)


def _chunks(rows: tuple[Tensor, ...], chunk_size: int) -> Iterator[tuple[Tensor, ...]]:
    for begin in range(0, rows[0].shape[2], chunk_size):
        yield tuple(x[:, :, begin : begin + chunk_size] for x in rows)
