"""`GDN2LM` in Hugging Face transformers: importing this module registers model_type "gdn2" with the Auto classes.

    import gdn2_ops.huggingface
    model = AutoModelForCausalLM.from_pretrained("examples/models/tiny")
    model.generate(input_ids, max_new_tokens=64)

A folder is the same for both: config.json and model.safetensors with the same names. Parameters, modules and arithmetic
are those of `gdn2_ops.model`; this file adds the conventions of transformers around them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor, nn

try:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
    from transformers.cache_utils import Cache
    from transformers.modeling_outputs import CausalLMOutputWithPast
except ImportError as error:
    raise ImportError(
        "gdn2_ops.huggingface needs transformers >= 5.23: pip install 'gdn2-ops[transformers]'"
    ) from error

from gdn2_ops.layers import GatedDeltaNet2, RMSNorm, reset_projection
from gdn2_ops.model import GDN2LM, GDN2Config, LayerState


class GDN2PretrainedConfig(PreTrainedConfig):
    """The options of `gdn2_ops.GDN2Config` under their names, and what transformers adds to every configuration.

    num_hidden_layers and tie_word_embeddings are other names of num_layers and tie_embeddings.
    """

    model_type = "gdn2"
    attribute_map = {"num_hidden_layers": "num_layers", "tie_word_embeddings": "tie_embeddings"}  # noqa: RUF012
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(self, use_cache: bool = True, **options: Any) -> None:
        self.use_cache = use_cache
        options = {self.attribute_map.get(name, name): value for name, value in options.items()}
        for field in fields(GDN2Config):
            setattr(self, field.name, options.pop(field.name, field.default))
        super().__init__(**options)

    def to_gdn2(self) -> GDN2Config:
        """The options of the model alone."""
        return GDN2Config(**{field.name: getattr(self, field.name) for field in fields(GDN2Config)})


class GDN2Cache(Cache):
    """What a model carries from token to token: one state per layer, of constant size. Rows can be chosen and repeated,
    as beam search does; tokens cannot be taken back."""

    is_compileable = False

    def __init__(self, states: tuple[LayerState, ...], length: int) -> None:
        super().__init__(layers=[])
        self.states, self.length = states, length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens the states have seen, padding included."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes row beam_idx[i]."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows."""
        self._map(lambda x: x[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self._map(lambda x: x.repeat_interleave(repeats, 0))

    def crop(self, *args: Any) -> None:
        """Raises NotImplementedError: a state cannot forget its last tokens."""
        raise NotImplementedError("GDN2Cache: a state cannot forget its last tokens; keep a copy from before them")

    def reset(self) -> None:
        """Back to the beginning of a sequence."""
        self._map(torch.zeros_like)
        self.length = 0

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        def mapped(state: Any) -> Any:
            return state._make(None if x is None else function(x) for x in state)

        self.states = tuple(mapped(state) for state in self.states)


class GDN2ForCausalLM(PreTrainedModel, GenerationMixin):
    """`GDN2LM` for transformers: `generate`, a loss from labels, `from_pretrained` and `save_pretrained`.

    Batches of prompts are padded on the left and say so in attention_mask; padding on the right is for training,
    without a cache. Generation keeps a `GDN2Cache`; caches of other kinds, and assisted generation, are refused.
    """

    config_class = GDN2PretrainedConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = {"A_log", "dt_bias"}  # noqa: RUF012
    _is_stateful = True

    def __init__(self, config: GDN2PretrainedConfig) -> None:
        super().__init__(config)
        model = GDN2LM(config.to_gdn2())
        self.embed, self.layers, self.norm = model.embed, model.layers, model.norm
        if not config.tie_embeddings:
            self.lm_head = model.lm_head
        for block in self._blocks():
            block.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: GDN2Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits of tokens, and the cache after them.

        Args:
            input_ids: [B, T] int64, or inputs_embeds [B, T, hidden_size].
            attention_mask: [B, T or all tokens so far], 0 where a token is padding.
            past_key_values: the cache of the tokens before; it is updated.
            labels: [B, T] int64, -100 where nothing is learned; shifted here.
            use_cache: whether a cache comes out. None is config.use_cache, in training no.
            output_hidden_states: whether the input of the first layer and the output of each come out.
            return_dict: False returns a tuple.
            logits_to_keep: how many logits from the end, 0 all; or which.

        Returns: loss, logits [B, T, vocab_size], past_key_values, hidden_states.
        Raises: ValueError: padding is neither on the left, nor on the right without a cache.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected either input_ids or inputs_embeds, got both or none")
        if past_key_values is not None and not isinstance(past_key_values, GDN2Cache):
            raise ValueError(f"expected past_key_values from this model, got {type(past_key_values).__name__}")
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        padding = _padding(attention_mask, past_key_values, x.shape[1], use_cache)
        length = 0 if past_key_values is None else past_key_values.length
        states, hidden = [], [x]
        for i, block in enumerate(self._blocks()):
            before = past_key_values.states[i] if past_key_values is not None and length else None
            x, state = self._block(block, x, before, padding)
            states.append(state)
            hidden.append(x)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        last = self.norm(x[:, kept])
        logits = nn.functional.linear(last, self.embed.weight) if self.config.tie_embeddings else self.lm_head(last)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **options)
        cache = None
        if use_cache:
            cache = GDN2Cache((), 0) if past_key_values is None else past_key_values
            cache.states, cache.length = tuple(states), length + x.shape[1]
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=cache,
            hidden_states=tuple(hidden) if output_hidden_states else None,
        )
        return output.to_tuple() if return_dict is False else output

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed = value

    def get_output_embeddings(self) -> nn.Module | None:
        return None if self.config.tie_embeddings else self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def _blocks(self) -> Iterable[Any]:
        return cast(Iterable[Any], self.layers)

    def _block(self, block: Any, x: Tensor, state: Any, padding: Tensor | None) -> tuple[Tensor, LayerState]:
        if block.gradient_checkpointing and self.training:
            return block._gradient_checkpointing_func(block.__call__, x, state, padding)
        if state is not None and x.shape[1] == 1 and not self.training:
            y, state = block.step(x[:, 0], state)
            return y.unsqueeze(1), state
        return block(x, state, padding)

    def _init_weights(self, module: nn.Module) -> None:
        """The initial values of `GDN2LM`, for parameters that no checkpoint brought."""
        brought = [(p, p.clone()) for p in module.parameters(recurse=False) if getattr(p, "_is_hf_initialized", False)]
        if isinstance(module, GatedDeltaNet2):
            module.reset_decays()
        elif isinstance(module, nn.Linear) and any(module is x for x in self._projections()):
            reset_projection(module)
        elif isinstance(module, (nn.Linear, nn.Conv1d)):
            module.reset_parameters()
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.hidden_size**-0.5)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        with torch.no_grad():
            for p, value in brought:
                p.copy_(value)

    def _projections(self) -> Iterator[nn.Module]:
        return (x for layer in self._blocks() if isinstance(layer.mixer, GatedDeltaNet2) for x in layer.mixer.modules())

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the first forward makes a GDN2Cache

    def _prepare_cache_for_generation(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"expected no cache_implementation, got {generation_config.cache_implementation!r}: the states of this "
                "model have one size and one form"
            )
        return super()._prepare_cache_for_generation(generation_config, *args, **kwargs)


def _padding(mask: Tensor | None, cache: GDN2Cache | None, T: int, use_cache: bool) -> Tensor | None:
    """How many leading tokens of each row are padding, [B]; None where no token is."""
    if mask is None or (T == 1 and cache is not None):
        return None
    if mask.dim() != 2 or mask.shape[1] < T:
        raise ValueError(f"expected an attention_mask of shape [B, T] with T >= {T}, got {tuple(mask.shape)}")
    real_BT = mask[:, mask.shape[1] - T :].bool()
    if bool(real_BT.all()):
        return None
    leading_B = real_BT.cumsum(1).eq(0).sum(1)
    on_the_left = leading_B + real_BT.sum(1) == T
    runs_B = real_BT[:, 0].long() + (real_BT[:, 1:] & ~real_BT[:, :-1]).sum(1)
    if not bool((on_the_left if use_cache else runs_B <= 1).all()):
        raise ValueError(
            "expected attention_mask to be 0 on the left of each row only (on the right too without a cache: "
            "use_cache=False), got zeros elsewhere; set tokenizer.padding_side = 'left'"
        )
    if cache is not None and cache.length and bool(leading_B.any()):
        raise ValueError("expected padding at the beginning of a sequence only, got some after cached tokens")
    return leading_B


AutoConfig.register("gdn2", GDN2PretrainedConfig)
AutoModelForCausalLM.register(GDN2PretrainedConfig, GDN2ForCausalLM)
