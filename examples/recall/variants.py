"""The rules of the study as gates of the one operator: each is a function from x, q, k, v to q, k, v, g, b, w.

What a rule learns (decays, gates) is in its module; projections, convolution, norms and the output are the mixer's and
the same for all. Each rule's recurrence, written out, is in tests/test_recall.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdn2_ops import gates

STEPS = (1e-4, 1e-2)  # initial steps of the decays
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Decay(nn.Module):
    """g = -exp(A_log) softplus(f(x) + dt_bias), per head or per key channel of a head; softplus(...) is the step.

    Initial rates of 1 to 16 as in the paper and steps a tenth of its (a training this short would not unlearn the
    forgetting), evenly spread in place of drawn: with two heads the draw would decide more than the rule does.
    """

    def __init__(self, size: int, heads: int, channels: int, rank: int | None = None) -> None:
        super().__init__()
        self.heads, self.channels = heads, channels
        low_rank = (nn.Linear(size, rank, bias=False), nn.Linear(rank, heads * channels, bias=False)) if rank else ()
        self.f = nn.Sequential(*low_rank) if rank else nn.Linear(size, heads * channels, bias=False)
        self.A_log = nn.Parameter((1 + 15 * _spread(heads)).log())
        quantile = _spread(heads) if channels == 1 else _spread(channels).repeat(heads)
        step = (math.log(STEPS[0]) + quantile * math.log(STEPS[1] / STEPS[0])).exp()
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """g and step, [B, T, H, channels], or [B, T, H] of one channel."""
        step = F.softplus(self.f(x) + self.dt_bias).unflatten(-1, (self.heads, self.channels))
        g = -self.A_log.exp()[:, None] * step
        return (g, step) if self.channels > 1 else (g.squeeze(-1), step.squeeze(-1))


def _spread(count: int) -> Tensor:
    """The middles of as many equal parts of [0, 1]."""
    return (torch.arange(count) + 0.5) / count


class Rule(nn.Module):
    """size: of x. heads, head_dim: H, and K = V. tokens: how many tokens of the operator stand for one of x."""

    tokens = 1

    def __init__(self, size: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.shape = (heads, head_dim)

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Inputs:
        raise NotImplementedError


class LinearAttention(Rule):
    """S_t = S_{t-1} + k_t v_t^T."""

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Inputs:
        return q, k, v, *gates.linear_attention(k, v)


class Mamba2(Rule):
    """S_t = exp(dt_t A) S_{t-1} + k_t (dt_t v_t)^T."""

    def __init__(self, size: int, heads: int, head_dim: int) -> None:
        super().__init__(size, heads, head_dim)
        self.decay = Decay(size, heads, 1)

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Inputs:
        _, step = self.decay(x)
        return q, k, v, *gates.mamba2(k, v, step, -self.decay.A_log.exp())


class Mamba3(Rule):
    """The trapezoidal rule of Mamba-3, one input and one output (SISO), with rotated keys and queries.

        S_t = exp(dt_t A) S_{t-1} + (1 - lambda_t) dt_t exp(dt_t A) k_{t-1} v_{t-1}^T + lambda_t dt_t k_t v_t^T

    Source: Lahoti et al. 2026, arXiv 2603.15569. The complex transition is a rotation of pairs of channels by angles
    that the data chooses, summed up over time; A is a constant of the head. Two tokens of the operator with b = 0: the
    first decays and writes the previous pair, the second writes this one and is read. Not taken over: the bias of keys
    and queries, with which Mamba-3 replaces the convolution that the mixer has here.
    """

    tokens = 2

    def __init__(self, size: int, heads: int, head_dim: int) -> None:
        super().__init__(size, heads, head_dim)
        self.decay = Decay(size, heads, 1)
        self.mix = nn.Linear(size, heads)
        self.angle = nn.Linear(size, heads * head_dim // 2, bias=False)
        nn.init.zeros_(self.angle.weight)
        self.angle.starts_at_zero = True  # the model draws no weights for it

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Inputs:
        heads, head_dim = self.shape
        g_BTH, step = self.decay(x)
        angle = (step[..., None] * self.angle(x).unflatten(-1, (heads, head_dim // 2))).cumsum(1)
        return trapezoid(rotate(q, angle), rotate(k, angle), v, g_BTH, step, self.mix(x).sigmoid())


def rotate(y: Tensor, angle: Tensor) -> Tensor:
    """Pairs (i, i + K/2) of y [..., K] turned by angle [..., K/2]."""
    first, second = y.chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)


def trapezoid(q: Tensor, k: Tensor, v: Tensor, g: Tensor, step: Tensor, mix: Tensor) -> Inputs:
    """The inputs of 2 T tokens from q, k, v [B, T, H, K] and g, step, mix [B, T, H]; outputs stand at odd tokens."""
    previous_k, previous_v = (F.pad(y, (0, 0, 0, 0, 1, 0))[:, :-1] for y in (k, v))
    w_previous = ((1 - mix) * step * g.exp())[..., None].expand(v.shape)
    w_now = (mix * step)[..., None].expand(v.shape)
    g_first = g[..., None].expand(k.shape)
    pairs = (
        (q, q),
        (previous_k, k),
        (previous_v, v),
        (g_first, torch.zeros_like(g_first)),
        (torch.zeros_like(k), torch.zeros_like(k)),
        (w_previous, w_now),
    )
    q, k, v, g, b, w = (torch.stack(pair, 2).flatten(1, 2) for pair in pairs)
    return q, k, v, g, b, w


class GatedDeltaNet(Rule):
    """S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T: a scalar of each head decays."""

    def __init__(self, size: int, heads: int, head_dim: int) -> None:
        super().__init__(size, heads, head_dim)
        self.decay = Decay(size, heads, 1)
        self.beta = nn.Linear(size, heads, bias=False)

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Inputs:
        g, _ = self.decay(x)
        return q, k, v, *gates.gated_delta_net(k, v, g, self.beta(x).sigmoid())


class KDA(Rule):
    """S_t = (I - beta_t k_t k_t^T) Diag(exp g_t) S_{t-1} + beta_t k_t v_t^T: every key channel decays by itself."""

    def __init__(self, size: int, heads: int, head_dim: int) -> None:
        super().__init__(size, heads, head_dim)
        self.decay = Decay(size, heads, head_dim, rank=head_dim)
        self.beta = nn.Linear(size, heads, bias=False)

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Inputs:
        g, _ = self.decay(x)
        return q, k, v, *gates.kda(k, v, g, self.beta(x).sigmoid())


class GDN2(Rule):
    """S_t = (I - k_t (b_t*k_t)^T) Diag(exp g_t) S_{t-1} + k_t (w_t*v_t)^T, with one gate or both per channel.

    A gate that is not per channel is one scalar of each head, apart from the other gate.
    """

    def __init__(self, size: int, heads: int, head_dim: int, *, erase: bool = True, write: bool = True) -> None:
        super().__init__(size, heads, head_dim)
        self.decay = Decay(size, heads, head_dim, rank=head_dim)
        self.b_proj = nn.Linear(size, heads * (head_dim if erase else 1), bias=False)
        self.w_proj = nn.Linear(size, heads * (head_dim if write else 1), bias=False)

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Inputs:
        heads, _ = self.shape
        g, _ = self.decay(x)
        b, w = (p(x).sigmoid().unflatten(-1, (heads, -1)).expand(k.shape) for p in (self.b_proj, self.w_proj))
        return q, k, v, g, b, w


VARIANTS: dict[str, Callable[[int, int, int], Rule]] = {
    "linear attention": LinearAttention,
    "Mamba-2": Mamba2,
    "Mamba-3": Mamba3,
    "Gated DeltaNet": GatedDeltaNet,
    "KDA": KDA,
    "GDN-2, erase only": lambda *sizes: GDN2(*sizes, write=False),
    "GDN-2, write only": lambda *sizes: GDN2(*sizes, erase=False),
    "GDN-2": GDN2,
}
