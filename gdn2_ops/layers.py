"""The token mixers: `GatedDeltaNet2`, and `SlidingWindowAttention` for hybrid models. State in, state out.

A mixer is called on whole sequences, `y, state = mixer(x, state)`, or on one token, `y, state = mixer.step(x, state)`;
a state of None is the beginning of a sequence. Nothing is mutated, so both trace into one graph without copies of
Python objects. `y = mixer.step_inplace(x, state)` overwrites the state instead.

`padding` [B] int64 counts the leading tokens of each row that are none: only at the beginning of a sequence; what
stands there changes no other token and no state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdn2_ops import functional, stability

OUTPUT_GATES: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}


class GDN2State(NamedTuple):
    """conv: [B, 2 H K + HV V, conv_size - 1], the last inputs of the convolution, or None without one.
    recurrent: [B, HV, K, V] float32."""

    conv: Tensor | None
    recurrent: Tensor


class _Inputs(NamedTuple):
    """The six inputs of the operator."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    b: Tensor
    w: Tensor


class WindowState(NamedTuple):
    """k, v: [B, heads, window - 1, head_dim], the last keys (before the rotation) and values, the newest last.
    length: [B] int64, how many of them are there yet."""

    k: Tensor
    v: Tensor
    length: Tensor


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps) * weight over the last axis, in float32. Source: arXiv 1910.07467.

    torch.nn.RMSNorm asks whether a size is greater than 1, which keeps one graph from serving every number of tokens.
    x * x, for x.square() is a slow Pow in an ONNX file.
    """

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        x_float = x.float()
        return (x_float * torch.rsqrt((x_float * x_float).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class GatedDeltaNet2(nn.Module):
    """The Gated DeltaNet-2 layer. Source: arXiv 2605.22791, section 3; parameter names as in published checkpoints.

    q, k: Linear, causal depthwise convolution, SiLU, L2 norm per head. v: Linear, convolution, SiLU.
    b = sigmoid(Linear), w = sigmoid(Linear), g = -exp(A_log) softplus(f(x) + dt_bias) in float32.
    Output: RMSNorm per head, times the output gate of a low-rank projection, then Linear.

    Args:
        hidden_size: channels of x.
        num_heads, head_dim: H and K.
        num_v_heads: HV, a multiple of H; None is H.
        expand_v: V = head_dim * expand_v.
        use_short_conv, conv_size: the convolution of q, k and v and its width.
        allow_neg_eigval: doubles b, to [0, 2].
        guard_erase: b goes through `gdn2_ops.guard_erase`, so that no token makes a state grow.
        output_gate: "silu" (the paper) or "sigmoid" (one public re-implementation; their weights do not mix).
        norm_eps: of the output norm.

    Shape: x [B, T, hidden_size] -> y [B, T, hidden_size], `GDN2State`.
    Raises: ValueError: the arguments do not fit together.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int = 16,
        head_dim: int = 128,
        num_v_heads: int | None = None,
        expand_v: float = 1.0,
        use_short_conv: bool = True,
        conv_size: int = 4,
        allow_neg_eigval: bool = False,
        guard_erase: bool = False,
        output_gate: str = "silu",
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.num_v_heads = num_heads if num_v_heads is None else num_v_heads
        self.head_v_dim = round(head_dim * expand_v)
        if self.num_v_heads % num_heads:
            raise ValueError(f"expected num_v_heads to be a multiple of num_heads = {num_heads}, got {num_v_heads}")
        if self.head_v_dim != head_dim * expand_v:
            raise ValueError(f"expected head_dim * expand_v to be whole, got {head_dim} * {expand_v}")
        if output_gate not in OUTPUT_GATES:
            raise ValueError(f"expected output_gate in {sorted(OUTPUT_GATES)}, got {output_gate!r}")
        if use_short_conv and conv_size < 2:
            raise ValueError(f"expected conv_size >= 2, got {conv_size}; use_short_conv=False leaves it out")
        self.use_short_conv, self.conv_size = use_short_conv, conv_size
        self.allow_neg_eigval, self.guard_erase, self.output_gate = allow_neg_eigval, guard_erase, output_gate
        key_dim, value_dim = num_heads * head_dim, self.num_v_heads * self.head_v_dim
        self.channels = [key_dim, key_dim, value_dim]

        self.q_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, value_dim, bias=False)
        self.b_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.w_proj = nn.Linear(hidden_size, value_dim, bias=False)
        self.f_proj = nn.Sequential(
            nn.Linear(hidden_size, self.head_v_dim, bias=False), nn.Linear(self.head_v_dim, key_dim, bias=False)
        )
        self.g_proj = nn.Sequential(
            nn.Linear(hidden_size, self.head_v_dim, bias=False), nn.Linear(self.head_v_dim, value_dim)
        )
        if use_short_conv:
            self.q_conv1d, self.k_conv1d, self.v_conv1d = (
                nn.Conv1d(n, n, conv_size, groups=n, bias=False) for n in self.channels
            )
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.dt_bias = nn.Parameter(torch.empty(key_dim))
        self.o_norm = RMSNorm(self.head_v_dim, eps=norm_eps)
        self.o_proj = nn.Linear(value_dim, hidden_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The paper's initial values: decays of a step between 1e-3 and 0.1 times a rate of 1 to 16 per head."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                reset_projection(module)
        self.reset_decays()

    def reset_decays(self) -> None:
        """The initial A_log and dt_bias."""
        with torch.no_grad():
            self.A_log.uniform_(1, 16).log_()
            step = self.dt_bias.uniform_(math.log(1e-3), math.log(0.1)).exp_()
            step += torch.log(-torch.expm1(-step))  # the inverse of softplus

    def forward(
        self, x: Tensor, state: GDN2State | None = None, padding: Tensor | None = None
    ) -> tuple[Tensor, GDN2State]:
        """x [B, T, hidden_size] -> y [B, T, hidden_size] and the state after the last token."""
        x = _without(padding, x)  # zeros are convolved to zeros, and write nothing into a state of zeros
        inputs, conv = self._inputs(x, None if state is None else state.conv)
        o, recurrent = functional.chunk(*inputs, None if state is None else state.recurrent)
        return self._output(o, x), GDN2State(conv, recurrent)

    def step(self, x: Tensor, state: GDN2State) -> tuple[Tensor, GDN2State]:
        """x [B, hidden_size], one token -> y [B, hidden_size] and the state after it."""
        token, conv = self._inputs(x, state.conv)
        o, recurrent = functional.step(*token, state.recurrent)
        return self._output(o, x), GDN2State(conv, recurrent)

    def step_inplace(self, x: Tensor, state: GDN2State) -> Tensor:
        """As `step`, the state overwritten: x [B, hidden_size] -> y [B, hidden_size]. Without gradients."""
        token, conv = self._inputs(x, state.conv)
        _overwrite(state.conv, conv)
        return self._output(functional.step_inplace(*token, state.recurrent), x)

    def initial_state(self, batch: int) -> GDN2State:
        """The state before the first token: zeros, on the device of the weights."""
        like = self.q_proj.weight
        conv = like.new_zeros(batch, sum(self.channels), self.conv_size - 1) if self.use_short_conv else None
        shape = (batch, self.num_v_heads, self.head_dim, self.head_v_dim)
        return GDN2State(conv, like.new_zeros(shape, dtype=torch.float32))

    def _inputs(self, x: Tensor, conv: Tensor | None) -> tuple[_Inputs, Tensor | None]:
        """The inputs of the operator and the new state of the convolution: x [B, T, D] or, of one token, [B, D]."""
        keys, values = (self.num_heads, self.head_dim), (self.num_v_heads, self.head_v_dim)
        qkv = self._qkv(x)
        if self.use_short_conv:
            weight_CW = torch.cat((self.q_conv1d.weight, self.k_conv1d.weight, self.v_conv1d.weight)).squeeze(1)
            if conv is None or x.dim() == 3:
                qkv, conv = self._convolve(qkv, conv, weight_CW)
            else:
                qkv, conv = self._convolve_token(qkv, conv, weight_CW)
        q, k, v = F.silu(qkv).split(self.channels, -1)
        q, k = (_l2_norm(y.unflatten(-1, keys)) for y in (q, k))
        rate_H1 = -self.A_log.float().exp()[:, None]
        g = rate_H1 * F.softplus(self.f_proj(x).float() + self.dt_bias.float()).unflatten(-1, keys)
        b = self.b_proj(x).sigmoid().unflatten(-1, keys)
        w = self.w_proj(x).sigmoid().unflatten(-1, values)
        b = 2 * b if self.allow_neg_eigval else b
        b = stability.guard_erase(k, b, g) if self.guard_erase else b
        return _Inputs(q, k, v.unflatten(-1, values), g, b, w), conv

    def _qkv(self, x: Tensor) -> Tensor:
        """What the convolution sees of x."""
        return torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), -1)

    def _convolve(self, x_BTC: Tensor, conv: Tensor | None, weight_CW: Tensor) -> tuple[Tensor, Tensor]:
        """Causal depthwise convolution as a sum of shifted inputs, which compilers fuse with what stands around it."""
        T, past = x_BTC.shape[1], self.conv_size - 1
        if conv is None:
            conv = x_BTC.new_zeros(x_BTC.shape[0], x_BTC.shape[2], past)
        seen_BTC = torch.cat((conv.mT, x_BTC), 1)
        y_BTC = seen_BTC[:, :T] * weight_CW[:, 0]
        for j in range(1, self.conv_size):
            y_BTC = y_BTC + seen_BTC[:, j : j + T] * weight_CW[:, j]
        return y_BTC, seen_BTC[:, T:].mT.contiguous()

    def _convolve_token(self, x_BC: Tensor, conv: Tensor, weight_CW: Tensor) -> tuple[Tensor, Tensor]:
        """`_convolve` of one token."""
        y_BC = (conv * weight_CW[:, :-1]).sum(-1) + x_BC * weight_CW[:, -1]
        return y_BC, torch.cat((conv[..., 1:], x_BC.unsqueeze(-1)), -1)

    def _output(self, o: Tensor, x: Tensor) -> Tensor:
        gate = OUTPUT_GATES[self.output_gate](self.g_proj(x)).unflatten(-1, o.shape[-2:])
        return self.o_proj((self.o_norm(o) * gate).flatten(-2))


class SlidingWindowAttention(nn.Module):
    """Causal multi-head attention over the last `window` tokens, this one among them, with rotary positions.

    The state holds keys before the rotation and each call rotates what it sees from position 0: scores depend on
    differences of positions only, so no position counter is carried and positions never grow past window + T.

    Shape: x [B, T, hidden_size] -> y [B, T, hidden_size], `WindowState`. Source: arXiv 2605.22791, hybrid models.
    """

    def __init__(self, hidden_size: int, *, num_heads: int, window: int, rope_theta: float = 1e4) -> None:
        super().__init__()
        if hidden_size % (2 * num_heads):
            raise ValueError(
                f"expected hidden_size to be a multiple of 2 * num_heads = {2 * num_heads}, got {hidden_size}"
            )
        if window < 2:
            raise ValueError(f"expected window >= 2, got {window}")
        self.num_heads, self.window, self.rope_theta = num_heads, window, rope_theta
        self.head_dim = hidden_size // num_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(4)
        )

    def forward(
        self, x: Tensor, state: WindowState | None = None, padding: Tensor | None = None
    ) -> tuple[Tensor, WindowState]:
        """x [B, T, hidden_size] -> y [B, T, hidden_size] and the last window - 1 keys and values."""
        T, x = x.shape[1], _without(padding, x)
        q, k, v = (self._heads(p(x)) for p in (self.q_proj, self.k_proj, self.v_proj))
        before = self.initial_state(x.shape[0]) if state is None else state
        seen_k, seen_v = torch.cat((before.k, k), 2), torch.cat((before.v, v), 2)
        length = before.length + T if padding is None else before.length + T - padding
        after = WindowState(seen_k[:, :, T:].clone(), seen_v[:, :, T:].clone(), length.clamp(max=self.window - 1))
        if state is not None:
            k, v = seen_k, seen_v
        past = k.shape[2] - T
        position = torch.arange(past + T, device=x.device)
        age_TL = position[past:, None] - position
        visible_BHTL = ((age_TL >= 0) & (age_TL < self.window))[None, None]
        if state is not None:
            visible_BHTL = visible_BHTL & (position >= past - before.length[:, None])[:, None, None]
        if padding is not None:  # padding sees itself: nothing at all would be not a number
            visible_BHTL = visible_BHTL & (position >= past + padding[:, None])[:, None, None] | (age_TL == 0)
        o = F.scaled_dot_product_attention(
            self._rotate(q, position[past:]), self._rotate(k, position), v, attn_mask=visible_BHTL
        )
        return self.o_proj(o.transpose(1, 2).flatten(-2)), after

    def step(self, x: Tensor, state: WindowState) -> tuple[Tensor, WindowState]:
        """x [B, hidden_size], one token -> y [B, hidden_size] and the state after it."""
        # The class's forward: an instance's may be that of a sequence split over ranks, and a step is local.
        y_B1D, state = SlidingWindowAttention.forward(self, x.unsqueeze(1), state)
        return y_B1D.squeeze(1), state

    def step_inplace(self, x: Tensor, state: WindowState) -> Tensor:
        """As `step`, the state overwritten: x [B, hidden_size] -> y [B, hidden_size]. The window moves by one place."""
        y, after = self.step(x, state)
        for old, new in zip(state, after):
            _overwrite(old, new)
        return y

    def initial_state(self, batch: int) -> WindowState:
        """The state before the first token: no keys yet."""
        like = self.q_proj.weight
        k, v = (like.new_zeros(batch, self.num_heads, self.window - 1, self.head_dim) for _ in range(2))
        return WindowState(k, v, like.new_zeros(batch, dtype=torch.int64))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _rotate(self, x_BHTD: Tensor, position_T: Tensor) -> Tensor:
        half = self.head_dim // 2
        frequency = self.rope_theta ** (-torch.arange(half, device=position_T.device, dtype=torch.float32) / half)
        angle_TD = position_T[:, None] * frequency
        sin, cos = angle_TD.sin().to(x_BHTD.dtype), angle_TD.cos().to(x_BHTD.dtype)
        x, y = x_BHTD.chunk(2, -1)
        return torch.cat((x * cos - y * sin, y * cos + x * sin), -1)


def _overwrite(old: Tensor | None, new: Tensor | None) -> None:
    if old is not None and new is not None:
        old.copy_(new)


def reset_projection(linear: nn.Linear) -> None:
    """The initial values of a projection of `GatedDeltaNet2`. Source: the configurations of arXiv 2605.22791."""
    nn.init.xavier_uniform_(linear.weight, gain=2**-2.5)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def _without(padding: Tensor | None, x_BTD: Tensor) -> Tensor:
    if padding is None:
        return x_BTD
    return x_BTD.masked_fill((torch.arange(x_BTD.shape[1], device=x_BTD.device) < padding[:, None])[..., None], 0)


def _l2_norm(x: Tensor) -> Tensor:
    """x / |x| over the last axis in float32; 1e-6 under the root keeps a zero vector zero."""
    x_float = x.float()
    return (x_float * torch.rsqrt((x_float * x_float).sum(-1, keepdim=True) + 1e-6)).to(x.dtype)
