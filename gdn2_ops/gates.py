"""Other linear-attention rules as gates of the one operator: `gdn2_ops.chunk(q, k, v, *gates.kda(k, v, g, beta))`.

Each constructor returns the g, b, w with which equation (1) is the named rule, expanded (not copied) to the shapes of
the operator. The keys, queries and values stay as they are. Table and derivations: docs/derivation.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Gates(NamedTuple):
    """g [B, T, H, K] float32 log decay, b [B, T, H, K] erase gate, w [B, T, HV, V] write gate."""

    g: Tensor
    b: Tensor
    w: Tensor


def linear_attention(k: Tensor, v: Tensor) -> Gates:
    """S_t = S_{t-1} + k_t v_t^T. Source: Katharopoulos et al. 2020, arXiv 2006.16236, without the normaliser.

    Args: k [B, T, H, K], v [B, T, HV, V].
    """
    return Gates(_zeros(k, torch.float32), _zeros(k), _ones(v))


def retnet(k: Tensor, v: Tensor, log_decay: Tensor) -> Gates:
    """S_t = gamma_h S_{t-1} + k_t v_t^T, one constant decay per head. Source: Sun et al. 2023, arXiv 2307.08621.

    Args: k [B, T, H, K], v [B, T, HV, V], log_decay [H]: log gamma_h <= 0, for example log(1 - 2 ** (-5 - h)).
    """
    return Gates(log_decay.float()[:, None].expand(k.shape), _zeros(k), _ones(v))


def gla(k: Tensor, v: Tensor, g: Tensor) -> Gates:
    """S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T. Source: Yang et al. 2023, arXiv 2312.06635.

    Args: k [B, T, H, K], v [B, T, HV, V], g [B, T, H, K] log decay <= 0.
    """
    return Gates(g.float(), _zeros(k), _ones(v))


def mamba2(B: Tensor, x: Tensor, dt: Tensor, A: Tensor) -> Gates:
    """S_t = exp(dt_t A_h) S_{t-1} + B_t (dt_t x_t)^T, the state-space duality form; q is C, k is B, v is x, scale is 1.

    Source: Dao and Gu 2024, arXiv 2405.21060. One group of B and C per head: H = HV.

    Args: B [B, T, H, K], x [B, T, H, V], dt [B, T, H] > 0, A [H] < 0.
    """
    g_BTH = dt.float() * A.float()
    return Gates(g_BTH[..., None].expand(B.shape), _zeros(B), dt.to(x.dtype)[..., None].expand(x.shape))


def delta_net(k: Tensor, v: Tensor, beta: Tensor) -> Gates:
    """S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T. Source: Yang et al. 2024, arXiv 2406.06484.

    Args: k [B, T, H, K], v [B, T, HV, V], beta [B, T, H] in [0, 1], or [0, 2] with negative eigenvalues.
    """
    return Gates(_zeros(k, torch.float32), *_tied(k, v, beta))


def gated_delta_net(k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Gates:
    """S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T. Source: Yang et al. 2024, arXiv 2412.06464.

    Args: k [B, T, H, K], v [B, T, HV, V], g [B, T, H] log decay <= 0, beta [B, T, H].
    """
    return Gates(g.float()[..., None].expand(k.shape), *_tied(k, v, beta))


def kda(k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Gates:
    """S_t = (I - beta_t k_t k_t^T) Diag(exp g_t) S_{t-1} + beta_t k_t v_t^T: Kimi Delta Attention.

    Source: arXiv 2510.26692. With tied gates dbeta = sum over K of db + sum over V of dw.

    Args: k [B, T, H, K], v [B, T, HV, V], g [B, T, H, K] log decay <= 0, beta [B, T, H].
    """
    return Gates(g.float(), *_tied(k, v, beta))


def _tied(k: Tensor, v: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """One beta for the erase gate of a key head and the write gates of its value heads."""
    beta_values = beta.repeat_interleave(v.shape[-2] // k.shape[-2], -1)
    return beta.to(k.dtype)[..., None].expand(k.shape), beta_values.to(v.dtype)[..., None].expand(v.shape)


def _zeros(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return like.new_zeros((), dtype=dtype or like.dtype).expand(like.shape)


def _ones(like: Tensor) -> Tensor:
    return like.new_ones(()).expand(like.shape)
