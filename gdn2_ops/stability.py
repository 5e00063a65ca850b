"""States that stay finite: `guard_erase` keeps tokens from making a state grow, `state_norms` says how large
they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SLOWEST = 1e-7  # exp(-2 g) - 1 of a channel without decay: such a token may grow by half of it


def guard_erase(k: Tensor, b: Tensor, g: Tensor) -> Tensor:
    """The erase gate, moved towards its k^2-weighted mean just far enough that a token cannot make a state grow.

        |(I - k (b*k)^T) Diag(exp g)| <= 1 in the spectral norm        docs/derivation.md, Stability, (14) and (15)

    A gate that is equal in all channels is safe, so there always is such a gate; one that is safe comes back bit for
    bit. k^T (b*k), the strength of the erase along the key, does not change. Plain operators, computed in the dtype of
    g and rounded to that of b: a rounding of the gate by 2^-9 (bfloat16) may grow by 3e-4 again, of float32 by 1e-7.

    Args:
        k: [..., K] float32, bfloat16 or float16. Keys, of length at most 1.
        b: [..., K], dtype of k. Erase gate, in [0, 2].
        g: [..., K] float32. Natural log of the decay, <= 0.

    Returns: [..., K], dtype of b. Its gradient in b is the identity (straight through), in k and g zero.
    Raises: ValueError: the shapes differ.
    """
    if k.shape != b.shape or k.shape != g.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (k, b, g))
        raise ValueError(f"gdn2_ops.guard_erase: expected k, b and g of one shape, got {shapes}")
    wide_b = b.to(g.dtype)
    gate, squares = wide_b.detach(), k.detach().to(g.dtype).square()
    weight = squares / torch.expm1(-2 * g.detach()).clamp(min=SLOWEST)
    length2, total = (x.sum(-1, keepdim=True).clamp(min=1e-12) for x in (squares, weight))
    erased = (squares * gate).sum(-1, keepdim=True)
    mean, slow_mean = erased / length2, (weight * gate).sum(-1, keepdim=True) / total
    off = gate - slow_mean
    spread = (weight * off * off).sum(-1, keepdim=True)  # about its own mean: a difference of sums has no digits left
    apart, erased = slow_mean - mean, erased.clamp(max=2)
    quadratic = (length2 + total) * spread + length2 * total * apart.square()
    linear = total * apart * (erased - 1)
    constant = 1 + total * erased * (2 - erased) / length2
    share = (constant / (linear + (linear.square() + quadratic * constant).sqrt()).abs()).clamp(max=1)
    return torch.addcmul(wide_b, gate - mean, share - 1).to(b.dtype)


def state_norms(state: Tensor | Sequence[Any]) -> Tensor:
    """How large the recurrent state of each sequence is: cheap enough to look at after every token.

    Args:
        state: [N, HV, K, V] float32, or the state of a model or a `Decoder`: one per layer. Layers of attention have
            no recurrent state and are left out.

    Returns: the Frobenius norms, [N] of one tensor or [N, layers] float32. They are inf or NaN where a number is not
        finite, and inf where its square is not (1.8e19): the norm of the layer's output has overflowed by then, too.
    """
    if isinstance(state, Tensor):
        return torch.linalg.vector_norm(state, dim=(-3, -2, -1))
    last = state[0][-1]  # of any kind of layer, one row for each sequence
    columns = [state_norms(layer.recurrent).unsqueeze(1) for layer in state if hasattr(layer, "recurrent")]
    return torch.cat([last.new_empty(last.shape[0], 0, dtype=torch.float32), *columns], 1)
