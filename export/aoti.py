"""A language model compiled ahead of time by AOTInductor: one .pt2 package for Python and for C++ without Python.

export(model, "model.pt2")

A process that runs the package needs the operators: `import gdn2_ops`, or in C++ the library libgdn2_torch.so
(examples/aoti_cpp). The package holds machine code for the processor that compiled it, and names the folder of
the torch it was compiled with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._inductor.package import package_aoti
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from gdn2_ops.export.program import BATCH, flatten_language_model

PREFILL, DECODE = "prefill", "decode"
STATES = "states"  # in the metadata of both programs: "float32 B 384 3;float32 B 4 32 32", in the order of the inputs


class _FlatDecode(nn.Module):
    """forward(token [B] int64, *past) -> logits [B, vocab]; the past is overwritten."""

    def __init__(self, model: nn.Module, state: Any) -> None:
        super().__init__()
        self.model = model
        self._spec = pytree.tree_structure(state)

    def forward(self, token: Tensor, *past: Tensor) -> Tensor:
        return self.model.decode_inplace(token, pytree.tree_unflatten(list(past), self._spec))  # type: ignore[operator]


def export(model: nn.Module, file: str | Path) -> Path:
    """Compiles a language model for this machine's processor and writes it as one package of two programs.

    "prefill": input_ids [B, T] int64, *past -> logits [B, T, vocab], *present.
    "decode": token [B] int64, *past -> logits [B, vocab]; the past is overwritten.
    Any B and T; every tensor contiguous, for a package does not look at strides. Before the first token the past is
    zeros of the shapes in the metadata (`STATES`, B the batch). Each program has its own copy of the weights, so the
    file is twice the size of the model.

    Args:
        model: a `GDN2LM`, or a module with its forward, decode_inplace and initial_state, in evaluation mode.
        file: where to write, ending in .pt2; its folder must exist.

    Returns: the file's path.
    Raises: ValueError: another ending, or a model in training mode. TypeError: a module of another kind.
    """
    file = Path(file)
    if file.suffix != ".pt2":
        raise ValueError(f"gdn2_ops.export.aoti: expected a file that ends in .pt2, got {str(file)!r}")
    if model.training:
        raise ValueError("gdn2_ops.export.aoti: expected a model in evaluation mode, got training; call model.eval()")
    flat = flatten_language_model(model)
    if not hasattr(model, "decode_inplace"):
        raise TypeError(f"expected a language model with decode_inplace(token, state), got {type(model).__name__}")
    state = model.initial_state(2)  # type: ignore[operator]
    past = pytree.tree_leaves(state)
    description = ";".join(" ".join((str(x.dtype)[6:], "B", *map(str, x.shape[1:]))) for x in past)
    with torch.no_grad():
        batch = {0: Dim(BATCH)}
        decode = torch.export.export(
            _FlatDecode(model, state).eval(),
            (torch.zeros(2, dtype=torch.int64, device=past[0].device), *past),
            dynamic_shapes={"token": batch, "past": (batch,) * len(past)},
        )
        files = {PREFILL: _compiled(flat.exported(), description), DECODE: _compiled(decode, description)}
    return Path(cast(str, package_aoti(str(file), files)))


def _compiled(program: ExportedProgram, states: str) -> list:
    options = {"aot_inductor.package": True, "aot_inductor.metadata": {STATES: states}}
    args, kwargs = program.example_inputs
    return cast(list, torch._inductor.aot_compile(program.module(), args, kwargs, options=options))
