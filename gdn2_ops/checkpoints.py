"""Checkpoints as the authors of the paper publish them, to `GDN2LM` and back.

The parameters of a `GatedDeltaNet2` have the same names in both. Around it the published code keeps

    transformer.wte, transformer.ln_f, lm_head          the embedding, the last norm, the output
    transformer.h.{i}.norm_1, .norm_2                   the norms before the mixer and before the MLP
    transformer.h.{i}.attn.*                            the mixer
    transformer.h.{i}.attn.attn, .attn.proj             where it is attention: q, k and v of each head in turn, output
    transformer.h.{i}.mlp.swiglu.w12, .w3               gate and up, one above the other (or apart: w1, w2), and down

A checkpoint does not say its output gate: the paper's is "silu"; weights of a layer with "sigmoid" are for that. The
layout is read from the published code; no published file was at hand to try it on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from gdn2_ops.model import GDN2LM, GDN2Config

_OUTER = {"transformer.wte.weight": "embed.weight", "transformer.ln_f.weight": "norm.weight"}
_OUTER["lm_head.weight"] = "lm_head.weight"
_INNER = {"norm_1.weight": "mixer_norm.weight", "norm_2.weight": "mlp_norm.weight"}
_INNER["mlp.swiglu.w3.weight"] = "mlp.down_proj.weight"
_LAYERS = "transformer.h."
_GATE, _UP = "mlp.gate_proj.weight", "mlp.up_proj.weight"
_PREFIXES = ("_forward_module.", "module.", "model.")  # of the wrappers that trained it


def load_published(file: str | Path, config: GDN2Config) -> GDN2LM:
    """The model of a published checkpoint, float32, in evaluation mode.

    Args:
        file: .safetensors, or what torch.save wrote; weights, or a dictionary with them under "model".
        config: its sizes and its output gate, for example `GDN2Config.preset("gdn2-1.3b")`.

    Raises: FileNotFoundError, ValueError: there is no such file, or its weights are not those of config.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"expected a checkpoint, got {str(file)!r}, which is no file")
    weights: dict[str, Any] = (
        load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True)
    )
    weights = weights.get("model", weights)
    with torch.device("meta"):
        model = GDN2LM(config)
    try:
        model.load_state_dict({name: x.float() for name, x in from_published(weights, config).items()}, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{file}: the weights do not fit the configuration: {error}") from error
    return model.eval().requires_grad_(False)


def from_published(weights: dict[str, Tensor], config: GDN2Config) -> dict[str, Tensor]:
    """Published names to those of `GDN2LM(config)`. Raises: ValueError: a name is in neither layout."""
    converted: dict[str, Tensor] = {}
    for published, x in weights.items():
        name = _unwrapped(published)
        if name in _OUTER:
            if not (config.tie_embeddings and name == "lm_head.weight"):
                converted[_OUTER[name]] = x
            continue
        layer, inner = _split(name, _LAYERS, published)
        converted |= {f"layers.{layer}.{ours}": y for ours, y in _from_layer(inner, x, config, published).items()}
    return converted


def to_published(weights: dict[str, Tensor], config: GDN2Config) -> dict[str, Tensor]:
    """Names of `GDN2LM(config)` to published ones. Raises: ValueError: a name is not of that model."""
    outer, inners = ({ours: theirs for theirs, ours in names.items()} for names in (_OUTER, _INNER))
    published: dict[str, Tensor] = {}
    if config.tie_embeddings:
        published["lm_head.weight"] = weights["embed.weight"]
    for name, x in weights.items():
        if name in outer:
            published[outer[name]] = x
            continue
        layer, inner = _split(name, "layers.", name)
        at = f"{_LAYERS}{layer}."
        if inner in inners:
            published[at + inners[inner]] = x
        elif inner == _GATE:
            published[at + "mlp.swiglu.w12.weight"] = torch.cat((x, weights[f"layers.{layer}.{_UP}"]))
        elif config.is_attention(int(layer)) and inner == "mixer.q_proj.weight":
            qkv = [weights[f"layers.{layer}.mixer.{p}_proj.weight"] for p in "qkv"]
            heads = [y.unflatten(0, (config.num_attention_heads, -1)) for y in qkv]
            published[at + "attn.attn.weight"] = torch.stack(heads, 1).flatten(0, 2)
        elif config.is_attention(int(layer)) and inner == "mixer.o_proj.weight":
            published[at + "attn.proj.weight"] = x
        elif inner.startswith("mixer.") and not config.is_attention(int(layer)):
            published[at + inner.replace("mixer.", "attn.", 1)] = x
        elif inner not in (_UP, "mixer.k_proj.weight", "mixer.v_proj.weight"):  # those went with q and the gate
            raise _unknown(name, "a GDN2LM")
    return published


def _from_layer(inner: str, x: Tensor, config: GDN2Config, published: str) -> dict[str, Tensor]:
    """One published parameter of a layer under our names; a fused one is several."""
    if inner in _INNER:
        return {_INNER[inner]: x}
    if inner == "mlp.swiglu.w12.weight":
        return dict(zip((_GATE, _UP), x.chunk(2)))
    if inner in ("mlp.swiglu.w1.weight", "mlp.swiglu.w2.weight"):
        return {_GATE if inner == "mlp.swiglu.w1.weight" else _UP: x}
    if inner == "attn.attn.weight":
        qkv = x.unflatten(0, (config.num_attention_heads, 3, -1)).unbind(1)
        return {f"mixer.{p}_proj.weight": y.flatten(0, 1) for p, y in zip("qkv", qkv)}
    if inner == "attn.proj.weight":
        return {"mixer.o_proj.weight": x}
    if inner.startswith("attn."):
        return {inner.replace("attn.", "mixer.", 1): x}
    raise _unknown(published, "a published checkpoint")


def _unwrapped(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _split(name: str, prefix: str, shown: str) -> tuple[str, str]:
    """The number of a layer and what follows."""
    layer, _, inner = name.removeprefix(prefix).partition(".")
    if not name.startswith(prefix) or not layer.isdigit():
        raise _unknown(shown, "a published checkpoint" if prefix == _LAYERS else "a GDN2LM")
    return layer, inner


def _unknown(name: str, layout: str) -> ValueError:
    return ValueError(f"expected the names of {layout}, got {name!r}")
