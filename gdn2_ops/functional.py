"""The public functions of Gated DeltaNet-2: `chunk` over sequences, `step` and `step_inplace` for one token."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gdn2_ops.custom_ops import contract
from gdn2_ops.custom_ops.autocast import lowered
from gdn2_ops.custom_ops.autograd import call

_CHUNK, _STEP = torch.ops.gdn2.chunk.default, torch.ops.gdn2.step.default
_STEP_INPLACE = torch.ops.gdn2.step_inplace.default


class GDN2Output(NamedTuple):
    """o: the outputs, dtype of q. state: [N, HV, K, V] float32, the state after the last token."""

    o: Tensor
    state: Tensor


def chunk(
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
) -> GDN2Output:
    """Gated delta rule with erase and write gates over whole sequences: training and prefill.

        S_t = (I - k_t (b_t*k_t)^T) Diag(exp g_t) S_{t-1} + k_t (w_t*v_t)^T        o_t = scale S_t^T q_t        (1)

    B batch, T tokens, H key heads, HV value heads (a multiple of H: value head i reads key head i // (HV / H)),
    K key channels and V value channels of a head, both at most 256, N sequences.

    Args:
        q: [B, T, H, K] float32, bfloat16 or float16. Queries.
        k: [B, T, H, K], dtype of q. Keys, of length at most 1; nothing normalises them here.
        v: [B, T, HV, V], dtype of q. Values.
        g: [B, T, H, K] float32. Natural log of the decay, finite and <= 0.
        b: [B, T, H, K], dtype of q. Erase gate, in [0, 1], or [0, 2] with negative eigenvalues.
        w: [B, T, HV, V], dtype of q. Write gate, in [0, 1].
        state: [N, HV, K, V] float32 before the first token. None is zeros.
        cu_seqlens: [N + 1] int32 or int64. Bounds of N sequences packed along T, from 0 to T; then B = 1. A sequence
            may be empty. None is one sequence per batch row: N = B.
        scale: of the outputs. None is K ** -0.5.

    Returns: o [B, T, HV, V], dtype of q; state [N, HV, K, V] float32, after the last token of each sequence.
    Raises: ValueError, TypeError: an argument does not match the list above.
    Differentiable once in every floating tensor. The values of g, b, w and k are not checked: with b up to 1
    and no decay a state can still grow; `gdn2_ops.guard_erase` prevents it. Source: arXiv 2605.22791, eq. 10.
    """
    try:
        return GDN2Output(*call(_CHUNK, q, k, v, g, b, w, state, cu_seqlens, _scale(scale, q)))
    except (RuntimeError, ValueError, TypeError) as error:
        raise _in_words(error, contract.check_chunk_call, q, k, v, g, b, w, state, cu_seqlens) from None


def step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor, state: Tensor, *, scale: float | None = None
) -> GDN2Output:
    """One token of `chunk` from one state to a new one: decoding in exported programs, where nothing is mutated.

    Args:
        q, k, b: [B, H, K];  v, w: [B, HV, V]: one dtype of float32, bfloat16 or float16.  g: [B, H, K] float32.
        state: [B, HV, K, V] float32, left as it is.
        scale: of the output. None is K ** -0.5.

    Returns: o [B, HV, V], dtype of q; state [B, HV, K, V] float32, after the token.
    Raises: ValueError, TypeError: an argument does not match the list above.
    Differentiable once in every tensor. Source: arXiv 2605.22791, eq. 10.
    """
    try:
        return GDN2Output(*call(_STEP, q, k, v, g, b, w, state, _scale(scale, q)))
    except (RuntimeError, ValueError, TypeError) as error:
        raise _in_words(error, contract.check_step, q, k, v, g, b, w, state) from None


def step_inplace(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    state: Tensor,
    *,
    slots: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """One token of `chunk`, the state overwritten: decoding in a server, with a pool of states.

    Args:
        q, k, b: [B, H, K];  v, w: [B, HV, V]: one dtype of float32, bfloat16 or float16.  g: [B, H, K] float32.
        state: [P, HV, K, V] float32, contiguous, overwritten, apart in memory from the inputs. Without slots P = B.
        slots: [B] int32 or int64, distinct, in [0, P). Row n of the batch updates state[slots[n]]. None is row n.
        scale: of the output. None is K ** -0.5.

    Returns: o [B, HV, V], dtype of q.
    Raises: ValueError, TypeError: an argument does not match the list above. RuntimeError: a gradient is asked for.
    Source: arXiv 2605.22791, eq. 10.
    """
    try:
        return call(_STEP_INPLACE, q, k, v, g, b, w, state, slots, _scale(scale, q))
    except (RuntimeError, ValueError, TypeError) as error:
        raise _in_words(error, contract.check_step_inplace_call, q, k, v, g, b, w, state, slots) from None


def _in_words(error: Exception, check: Callable[..., None], *arguments) -> Exception:
    """A kernel refuses what does not match the contract, in a few words; the contract says it in its own."""
    try:
        check(*lowered(*arguments[:6]), *arguments[6:])
    except (ValueError, TypeError) as better:
        return better
    return error


def _scale(scale: float | None, q: Tensor) -> float:
    if scale is None and q.dim() > 0 and q.shape[-1] > 0:
        return q.shape[-1] ** -0.5
    return 1.0 if scale is None else scale  # of a q without channels, which the operator refuses with its own words
