"""`Decoder`: a language model that keeps the state of its sequences, for decode loops that are compiled or exported."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gdn2_ops.model import GDN2LM, LayerState


class Decoder(nn.Module):
    """A language model and the state of one batch as buffers: tokens go in, logits come out, the state is overwritten.

        decoder = Decoder(model, batch=1)
        step = torch.compile(decoder, fullgraph=True, mode="reduce-overhead")
        logits = decoder.prefill(prompt)                    # [1, T]
        for _ in range(count):
            logits = step(logits.argmax(-1))

    Buffers have one address for good, which is what CUDA graphs and programs with mutated buffers need. They are no
    part of a saved model. Sequences that do not share a batch for their whole life keep states of their own and call
    `GDN2LM.decode_inplace`.

    Args:
        model: in evaluation mode; shared, not copied.
        batch: the number of sequences.
    """

    def __init__(self, model: GDN2LM, batch: int) -> None:
        super().__init__()
        self.model = model
        self._fields: list[tuple[Any, list[str | None]]] = []  # of each layer: type of the state, names of its buffers
        for i, state in enumerate(model.initial_state(batch)):
            names = [None if x is None else f"{field}_{i}" for field, x in state._asdict().items()]
            self._fields.append((type(state), names))
            for name, x in zip(names, state):
                if name is not None:
                    self.register_buffer(name, x, persistent=False)

    @property
    def state(self) -> tuple[LayerState, ...]:
        """The buffers as `GDN2LM` has them."""
        return tuple(
            kind(*(None if name is None else getattr(self, name) for name in names)) for kind, names in self._fields
        )

    @torch.no_grad()
    def forward(self, token: Tensor) -> Tensor:
        """token [batch] int64 -> logits [batch, vocab_size]; the state moves on by one token."""
        return self.model.decode_inplace(token, self.state)

    @torch.no_grad()
    def prefill(self, tokens: Tensor) -> Tensor:
        """tokens [batch, T] int64, read from the beginning -> logits [batch, vocab_size] of the last one."""
        logits, state = self.model.prefill(tokens)
        self.load(state)
        return logits

    @torch.no_grad()
    def load(self, state: tuple[LayerState, ...]) -> None:
        """Copies a state into the buffers. Raises: ValueError: it is not of this model and batch."""
        mine, other = (pytree.tree_leaves(tuple(map(tuple, x))) for x in (self.state, state))
        shapes = [[tuple(x.shape) for x in leaves] for leaves in (mine, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"expected a state of shapes {shapes[0]}, got {shapes[1]}; is it of another batch or model?"
            )
        for x, y in zip(mine, other):
            x.copy_(y)

    def reset(self) -> None:
        """Back to the beginning of the sequences."""
        for x in self.buffers(recurse=False):
            x.zero_()
