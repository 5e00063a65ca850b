"""A small language model around a rule, the same for all of them but for the width of its SwiGLU.

That width makes up for the parameters of the rule's gates, so that every variant has as many as the largest one.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gdn2_ops
from examples.recall.variants import VARIANTS, Rule
from gdn2_ops.layers import RMSNorm
from gdn2_ops.model import SwiGLU

EPS = 1e-5


class Mixer(nn.Module):
    """q, k, v: Linear, convolution, SiLU, and an L2 norm of q and k; the rule; RMSNorm, output gate, Linear."""

    def __init__(self, size: int, heads: int, head_dim: int, rule: Rule, conv_size: int = 4) -> None:
        super().__init__()
        self.heads, inner = (heads, head_dim), heads * head_dim
        self.qkv_proj = nn.Linear(size, 3 * inner, bias=False)
        self.conv = nn.Conv1d(3 * inner, 3 * inner, conv_size, groups=3 * inner, bias=False)
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.rule = rule
        self.o_norm = RMSNorm(head_dim, eps=1e-12)  # the small steps of Mamba write small values
        self.o_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y_BTC, weight_CW = self.qkv_proj(x), self.conv.weight.squeeze(1)
        T, width = x.shape[1], weight_CW.shape[1]
        seen = F.pad(y_BTC, (0, 0, width - 1, 0))
        y_BTC = F.silu(sum(seen[:, j : j + T] * weight_CW[:, j] for j in range(width)))
        q, k, v = (y.unflatten(-1, self.heads) for y in y_BTC.chunk(3, -1))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        o, _ = gdn2_ops.chunk(*self.rule(x, q, k, v))
        o = o[:, self.rule.tokens - 1 :: self.rule.tokens]
        gate = F.silu(self.gate_proj(x)).unflatten(-1, self.heads)
        return self.o_proj((self.o_norm(o) * gate).flatten(-2))

    @torch.no_grad()
    def associate(self) -> None:
        """Queries see tokens as the keys of their successors do: what followed a token can be asked for by that token.

        With projections and convolutions drawn apart, 500 steps did not leave chance; with these, 200 remember four
        pairs. It is given to all variants: what is learned, and compared, is how to keep many associations apart.
        """
        q_DC, k_DC, _ = self.qkv_proj.weight.chunk(3)
        k_DC.copy_(q_DC)
        self.conv.weight *= 0.2
        q_CW, k_CW, v_CW = self.conv.weight.squeeze(1).chunk(3)  # taps: the last one is this token
        q_CW[:, -2:] += torch.tensor([0.25, 0.75])
        k_CW[:, -3:-1] += torch.tensor([0.25, 0.75])
        v_CW[:, -1] += 1


class Block(nn.Module):
    """Pre-norm: mixer, SwiGLU."""

    def __init__(self, size: int, mixer: Mixer, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(RMSNorm(size, eps=EPS) for _ in range(2))
        self.mixer, self.mlp = mixer, SwiGLU(size, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class Model(nn.Module):
    """tokens [B, T] -> logits [B, T, vocab], with tied embeddings."""

    def __init__(self, variant: str, vocab: int, *, size: int, layers: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, size)
        self.blocks = nn.ModuleList()
        for _ in range(layers):
            mixer = Mixer(size, heads, head_dim, VARIANTS[variant](size, heads, head_dim))
            self.blocks.append(Block(size, mixer, mlp_width(variant, size, heads, head_dim)))
        self.norm = RMSNorm(size, eps=EPS)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights, and every mixer an associative memory from the start."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding) and not hasattr(module, "starts_at_zero"):
                nn.init.normal_(module.weight, std=self.embedding.embedding_dim**-0.5)
        with torch.no_grad():
            for block in self.blocks:
                block.mixer.associate()
                for projection in (block.mixer.o_proj, block.mlp.down_proj):
                    projection.weight *= (2 * len(self.blocks)) ** -0.5

    def forward(self, tokens: Tensor, asked: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x[asked]), self.embedding.weight)


@functools.cache
def mlp_width(variant: str, size: int, heads: int, head_dim: int) -> int:
    """Such that the rule and its SwiGLU have about as many parameters as the largest rule and one of twice the size."""
    largest = max(_parameters(name, size, heads, head_dim) for name in VARIANTS)
    return size + round((largest - _parameters(variant, size, heads, head_dim)) / (3 * size))


def _parameters(variant: str, size: int, heads: int, head_dim: int) -> int:
    return sum(p.numel() for p in VARIANTS[variant](size, heads, head_dim).parameters())
