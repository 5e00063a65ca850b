"""`GDN2LM`: a language model of Gated DeltaNet-2 layers, alone or alternating with sliding-window attention."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gdn2_ops.layers import GatedDeltaNet2, GDN2State, RMSNorm, SlidingWindowAttention, WindowState

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
_OF_TRANSFORMERS = {"architectures", "dtype", "transformers_version", "use_cache"}  # in a config.json that it wrote
LayerState = GDN2State | WindowState
Mixer = GatedDeltaNet2 | SlidingWindowAttention


@dataclass(frozen=True)
class GDN2Config:
    """Sizes and options of a `GDN2LM`; the defaults are the paper's 1.3B recurrent model.

    vocab_size, hidden_size, num_layers, intermediate_size (of the SwiGLU), norm_eps, tie_embeddings: the model.
    num_heads to output_gate: `GatedDeltaNet2`. attention_every: n makes every n-th layer `SlidingWindowAttention` with
    num_attention_heads, window and rope_theta; 0 none.
    """

    vocab_size: int = 32000
    hidden_size: int = 2304
    num_layers: int = 18
    intermediate_size: int = 6208
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    num_heads: int = 16
    head_dim: int = 128
    num_v_heads: int | None = None
    expand_v: float = 1.0
    use_short_conv: bool = True
    conv_size: int = 4
    allow_neg_eigval: bool = False
    guard_erase: bool = False
    output_gate: str = "silu"
    attention_every: int = 0
    num_attention_heads: int = 18
    window: int = 2048
    rope_theta: float = 1e4

    def is_attention(self, layer: int) -> bool:
        """Whether that layer is `SlidingWindowAttention`."""
        return self.attention_every > 0 and (layer + 1) % self.attention_every == 0

    @classmethod
    def preset(cls, name: str) -> GDN2Config:
        """The configuration of that name in `PRESETS`. Raises: ValueError: there is none."""
        if name not in PRESETS:
            raise ValueError(f"expected a preset in {sorted(PRESETS)}, got {name!r}")
        return PRESETS[name]

    @classmethod
    def load(cls, folder: str | Path) -> GDN2Config:
        """Reads config.json. Raises: FileNotFoundError, ValueError: it is missing, or not of this model."""
        file = Path(folder) / CONFIG_FILE
        if not file.is_file():
            raise FileNotFoundError(f"expected a model folder with {CONFIG_FILE}, got {str(folder)!r} without it")
        values = json.loads(file.read_text())
        if values.pop("model_type", None) != "gdn2":
            raise ValueError(f"{file}: expected model_type 'gdn2'")
        names = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - names - _OF_TRANSFORMERS)
        if unknown:
            raise ValueError(f"{file}: unknown options {unknown}; was it written by a newer version?")
        return cls(**{name: value for name, value in values.items() if name in names})

    def save(self, folder: str | Path) -> None:
        """Writes config.json."""
        (Path(folder) / CONFIG_FILE).write_text(json.dumps({"model_type": "gdn2", **asdict(self)}, indent=2) + "\n")


PRESETS = {
    "gdn2-1.3b": GDN2Config(),
    "gdn2-1.3b-hybrid": GDN2Config(intermediate_size=6784, attention_every=2),
    "tiny": GDN2Config(
        vocab_size=256,
        hidden_size=128,
        num_layers=4,
        intermediate_size=320,
        tie_embeddings=True,
        num_heads=4,
        head_dim=32,
    ),
}


class LMOutput(NamedTuple):
    """logits [B, T, vocab_size], or [B, vocab_size] for one token; state: one per layer, after the last token."""

    logits: Tensor
    state: tuple[LayerState, ...]


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)). Source: Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm residual block: mixer, then SwiGLU. Shapes as the mixer's."""

    def __init__(self, config: GDN2Config, mixer: Mixer) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mixer = mixer
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, state: Any = None, padding: Tensor | None = None) -> tuple[Tensor, LayerState]:
        mixed, state = self.mixer(self.mixer_norm(x), state, padding)
        return self._residual(x, mixed), state

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, LayerState]:
        mixed, state = self.mixer.step(self.mixer_norm(x), state)
        return self._residual(x, mixed), state

    def step_inplace(self, x: Tensor, state: Any) -> Tensor:
        return self._residual(x, self.mixer.step_inplace(self.mixer_norm(x), state))

    def _residual(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x))


class GDN2LM(nn.Module):
    """A causal language model. Source: arXiv 2605.22791, section 4 and the published configurations.

        model = GDN2LM.from_pretrained("examples/models/tiny")
        logits, state = model.prefill(tokens)                   # once
        logits, state = model.decode(logits.argmax(-1), state)  # then token by token

    Args: config: a `GDN2Config`.
    """

    def __init__(self, config: GDN2Config) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, _mixer(config, i)) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        nn.init.normal_(self.embed.weight, std=config.hidden_size**-0.5)

    def forward(self, tokens: Tensor, state: tuple[LayerState, ...] | None = None) -> LMOutput:
        """tokens [B, T] int64, and the state before them -> logits [B, T, vocab_size] and the state after them."""
        x, state = self._hidden(tokens, state)
        return LMOutput(self._logits(x), state)

    @torch.no_grad()
    def prefill(self, tokens: Tensor, state: tuple[LayerState, ...] | None = None) -> LMOutput:
        """As `forward`, for generation: logits [B, vocab_size] of the last token only, and no gradients."""
        x, state = self._hidden(tokens, state)
        return LMOutput(self._logits(x[:, -1]), state)

    @torch.no_grad()
    def decode(self, token: Tensor, state: tuple[LayerState, ...]) -> LMOutput:
        """token [B] int64 -> logits [B, vocab_size] and the new state; the old one is left as it is."""
        x = self.embed(token)
        states = []
        for layer, layer_state in zip(self._blocks(), state, strict=True):
            x, layer_state = layer.step(x, layer_state)
            states.append(layer_state)
        return LMOutput(self._logits(x), tuple(states))

    @torch.no_grad()
    def decode_inplace(self, token: Tensor, state: tuple[LayerState, ...]) -> Tensor:
        """As `decode`, the state overwritten: token [B] int64 -> logits [B, vocab_size]."""
        x = self.embed(token)
        for layer, layer_state in zip(self._blocks(), state, strict=True):
            x = layer.step_inplace(x, layer_state)
        return self._logits(x)

    def initial_state(self, batch: int) -> tuple[LayerState, ...]:
        """The state before the first token, for callers that need tensors where None will not do."""
        return tuple(layer.mixer.initial_state(batch) for layer in self._blocks())

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Writes config.json and model.safetensors; dtype is the stored type of matrices, vectors stay as they are."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save(folder)
        stored = {
            name: (x.to(dtype) if dtype is not None and x.dim() > 1 else x).contiguous()
            for name, x in self.state_dict().items()
        }
        save_file(stored, folder / WEIGHTS_FILE)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> GDN2LM:
        """Reads what `save_pretrained` wrote, in evaluation mode, parameters as dtype on device.

        Raises: FileNotFoundError, ValueError: a file is missing, or the weights do not fit the configuration.
        """
        config = GDN2Config.load(folder)
        file = Path(folder) / WEIGHTS_FILE
        if not file.is_file():
            raise FileNotFoundError(f"expected a model folder with {WEIGHTS_FILE}, got {str(folder)!r} without it")
        with torch.device("meta"):
            model = cls(config)
        weights = {name: x.to(dtype) for name, x in load_file(file, device=str(device)).items()}
        try:
            model.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            raise ValueError(f"{file}: the weights do not fit {CONFIG_FILE}: {error}") from error
        return model.eval().requires_grad_(False)

    def _hidden(self, tokens: Tensor, state: tuple[LayerState, ...] | None) -> tuple[Tensor, tuple[LayerState, ...]]:
        x = self.embed(tokens)
        states = []
        for layer, layer_state in zip(self._blocks(), state or [None] * len(self.layers), strict=True):
            x, layer_state = layer(x, layer_state)
            states.append(layer_state)
        return x, tuple(states)

    def _blocks(self) -> Iterable[Block]:
        return cast(Iterable[Block], self.layers)

    def _logits(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return F.linear(x, self.embed.weight) if self.config.tie_embeddings else self.lm_head(x)


def _mixer(config: GDN2Config, i: int) -> Mixer:
    if config.is_attention(i):
        return SlidingWindowAttention(
            config.hidden_size,
            num_heads=config.num_attention_heads,
            window=config.window,
            rope_theta=config.rope_theta,
        )
    return GatedDeltaNet2(
        config.hidden_size,
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        num_v_heads=config.num_v_heads,
        expand_v=config.expand_v,
        use_short_conv=config.use_short_conv,
        conv_size=config.conv_size,
        allow_neg_eigval=config.allow_neg_eigval,
        guard_erase=config.guard_erase,
        output_gate=config.output_gate,
        norm_eps=config.norm_eps,
    )
