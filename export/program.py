"""A stateful language model as a flat program: tensors in, tensors out, dimensions named once.

A language model here is any module with `forward(tokens, state) -> (logits, state)` and `initial_state(batch)`, whose
state is a tuple with one NamedTuple of tensors (or None) per layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

BATCH, SEQUENCE = "batch", "sequence"
STATE_NAMES = "{when}.{layer}.{field}"  # onnxruntime-genai's default: past.0.recurrent, present.0.recurrent


class FlatModel(nn.Module):
    """forward(input_ids [B, T] int64, *past) -> (logits [B, T, vocab], *present), the state as separate tensors."""

    def __init__(self, model: nn.Module, state: Any) -> None:
        super().__init__()
        self.model = model
        self._spec = pytree.tree_structure(state)

    def forward(self, input_ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        logits, state = self.model(input_ids, pytree.tree_unflatten(list(past), self._spec))
        return logits, *pytree.tree_leaves(state)


@dataclass(frozen=True)
class FlatProgram:
    """A `FlatModel` with everything an exporter asks for.

    module, args, dynamic_shapes: for torch.export.export and torch.onnx.export. input_names, output_names: of the
    tensors, in order.
    """

    module: FlatModel
    args: tuple[Tensor, ...]
    dynamic_shapes: dict[str, Any]
    input_names: list[str]
    output_names: list[str]

    def exported(self, *, strict: bool = False) -> ExportedProgram:
        """torch.export of the program: `torch.ops.gdn2.chunk` nodes, any batch and any number of tokens."""
        return torch.export.export(self.module, self.args, dynamic_shapes=self.dynamic_shapes, strict=strict)


def flatten_language_model(model: nn.Module, *, state_names: str = STATE_NAMES) -> FlatProgram:
    """A language model as a `FlatProgram` over dynamic batch and sequence length.

    Args:
        model: in evaluation mode.
        state_names: template of the names of states; {when} is past or present, {layer} the index, {field} the name.

    Raises: TypeError: the module is not a language model in the sense of this file.
    """
    if not hasattr(model, "initial_state"):
        raise TypeError(
            "expected a language model with initial_state(batch) and forward(tokens, state), "
            f"got {type(model).__name__}"
        )
    batch, tokens = 2, 3
    state = cast(Any, model).initial_state(batch)
    batch_dim, sequence_dim = Dim(BATCH), Dim(SEQUENCE)
    device = next(model.parameters()).device
    input_ids = torch.zeros(batch, tokens, dtype=torch.int64, device=device)
    names = [
        (layer, field) for layer, fields in enumerate(state) for field, x in fields._asdict().items() if x is not None
    ]
    past = pytree.tree_leaves(state)
    return FlatProgram(
        module=FlatModel(model, state).train(model.training),
        args=(input_ids, *past),
        dynamic_shapes={"input_ids": {0: batch_dim, 1: sequence_dim}, "past": ({0: batch_dim},) * len(past)},
        input_names=["input_ids", *(state_names.format(when="past", layer=i, field=f) for i, f in names)],
        output_names=["logits", *(state_names.format(when="present", layer=i, field=f) for i, f in names)],
    )
