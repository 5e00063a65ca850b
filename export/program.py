"""A module as a flat program: tensors in, tensors out, each with a name, dimensions named once.

flatten_module(module, args)       any module, its example arguments
flatten_language_model(model)      `forward(tokens, state) -> (logits, state)` and `initial_state(batch)`, whose
                                   state is a tuple with one NamedTuple of tensors (or None) per layer
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

BATCH, SEQUENCE = "batch", "sequence"
STATE_NAMES = "{when}.{layer}.{field}"  # onnxruntime-genai's default: past.0.recurrent, present.0.recurrent
_CONSTANTS = (type(None), bool, int, float, str)


class FlatModule(nn.Module):
    """forward(*tensors) -> tensors: those among the arguments and the results of a module, everything else fixed."""

    def __init__(self, module: nn.Module, args: tuple) -> None:
        super().__init__()
        self.module = module
        leaves, self._spec = pytree.tree_flatten(args)
        self._constants = [None if isinstance(x, Tensor) else x for x in leaves]
        self._at = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = list(self._constants)
        for i, x in zip(self._at, tensors, strict=True):
            leaves[i] = x
        results = self.module(*pytree.tree_unflatten(leaves, self._spec))
        return tuple(x for x in pytree.tree_leaves(results) if isinstance(x, Tensor))


class _Float32Logits(nn.Module):
    """Logits in float32 whatever the weights are: what samples from them has no float16 or bfloat16."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        logits, state = self.model(input_ids, state)
        return logits.float(), state


@dataclass(frozen=True)
class FlatProgram:
    """A `FlatModule` with everything an exporter asks for.

    module, args, dynamic_shapes: for torch.export.export and torch.onnx.export. input_names, output_names: of the
    tensors, in order.
    """

    module: FlatModule
    args: tuple[Tensor, ...]
    dynamic_shapes: dict[str, Any]
    input_names: list[str]
    output_names: list[str]

    def exported(self, *, strict: bool = False) -> ExportedProgram:
        """torch.export of the program: `torch.ops.gdn2.*` nodes, any size along the dynamic dimensions."""
        return torch.export.export(self.module, self.args, dynamic_shapes=self.dynamic_shapes, strict=strict)


def flatten_module(
    module: nn.Module,
    args: Sequence[Any],
    *,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> FlatProgram:
    """Any module as a `FlatProgram`. It is called once, for the number and the names of its results.

    Args:
        module: in the mode to export.
        args: example arguments of forward: tensors, None, numbers, and tuples, lists, dicts and NamedTuples of them.
            What is no tensor is fixed. One tensor given twice makes two inputs.
        dynamic: {input name: {axis: name of the dimension}}; one name is one size. Other axes keep their example's.
        input_names: one per tensor of args. None names them after forward's parameters: x, state.recurrent, tokens.0.
        output_names: one per tensor of the results. None: fields of a NamedTuple, keys of a dict, else output_0, ...

    Raises: TypeError: an argument of another kind. ValueError: names do not match the tensors, or are not distinct.
    """
    # One tensor object for two inputs would be traced as one input: every input gets its own.
    args = _cloned(tuple(args))
    paths: list[tuple[Any, Any]] = pytree.tree_flatten_with_path(args)[0]
    for path, x in paths:
        if not isinstance(x, (Tensor, *_CONSTANTS)):
            raise TypeError(
                f"expected tensors, numbers, None and containers of them as arguments, got {type(x).__name__} at "
                f"args{pytree.keystr(path)}; pass its tensors in a tuple"
            )
    tensors = tuple(x for _, x in paths if isinstance(x, Tensor))
    parameters = _parameter_names(module, len(args))
    found = [_name((parameters[path[0].idx], *path[1:])) for path, x in paths if isinstance(x, Tensor)]
    inputs = _checked_names("input", input_names, found)
    with torch.no_grad():
        results = module(*_cloned(args))
    found = [
        _name(path) if path else "output" for path, x in pytree.tree_flatten_with_path(results)[0] if _is_tensor(x)
    ]
    found = [f"output_{name}" if name[0].isdigit() else name for name in found]
    outputs = _checked_names("output", output_names, [f"{name}_out" if name in inputs else name for name in found])
    if set(inputs) & set(outputs):
        raise ValueError(f"expected other names for outputs than for inputs, got {sorted(set(inputs) & set(outputs))}")
    return FlatProgram(
        FlatModule(module, tuple(args)).train(module.training),
        tensors,
        _dims(dynamic, inputs, tensors),
        inputs,
        outputs,
    )


def flatten_language_model(model: nn.Module, *, state_names: str = STATE_NAMES) -> FlatProgram:
    """A language model as a `FlatProgram` over dynamic batch and sequence length; its logits come out in float32.

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
    device = next(model.parameters()).device
    args = (torch.zeros(batch, tokens, dtype=torch.int64, device=device), state)
    names = [
        (layer, field) for layer, fields in enumerate(state) for field, x in fields._asdict().items() if x is not None
    ]
    past = [state_names.format(when="past", layer=i, field=f) for i, f in names]
    present = [state_names.format(when="present", layer=i, field=f) for i, f in names]
    inputs = _checked_names("input", ["input_ids", *past], ["input_ids", *past])
    tensors = tuple(x.clone() for x in pytree.tree_leaves(args) if _is_tensor(x))
    dynamic = {"input_ids": {0: BATCH, 1: SEQUENCE}} | {name: {0: BATCH} for name in past}
    return FlatProgram(
        module=FlatModule(_Float32Logits(model), args).train(model.training),
        args=tensors,
        dynamic_shapes=_dims(dynamic, inputs, tensors),
        input_names=inputs,
        output_names=_checked_names("output", ["logits", *present], ["logits", *present]),
    )


def _dims(
    dynamic: Mapping[str, Mapping[int, str]] | None, inputs: list[str], tensors: tuple[Tensor, ...]
) -> dict[str, Any]:
    """The dynamic_shapes of a `FlatModule`."""
    dynamic = dynamic or {}
    unknown = sorted(set(dynamic) - set(inputs))
    if unknown:
        raise ValueError(f"expected dynamic to name inputs among {inputs}, got {unknown}")
    for name, axes in dynamic.items():
        rank = tensors[inputs.index(name)].dim()
        if not all(0 <= axis < rank for axis in axes):
            raise ValueError(f"expected axes of {name} in 0..{rank - 1} in dynamic, got {sorted(axes)}")
    dims = {size: Dim(size) for axes in dynamic.values() for size in axes.values()}
    return {"tensors": tuple({axis: dims[size] for axis, size in dynamic.get(name, {}).items()} for name in inputs)}


def _parameter_names(module: nn.Module, count: int) -> list[str]:
    """Names of the first `count` positional parameters of forward; *rest gives rest_0, rest_1, ..."""
    names: list[str] = []
    for parameter in inspect.signature(module.forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            return names + [f"{parameter.name}_{i}" for i in range(count - len(names))]
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    if count > len(names):
        raise ValueError(f"expected at most {len(names)} args, those of {type(module).__name__}.forward, got {count}")
    return names


def _name(path: Sequence[Any]) -> str:
    """state.0.recurrent of a parameter's name and the keys below it."""
    return ".".join(str(next((getattr(k, a) for a in ("idx", "key", "name") if hasattr(k, a)), k)) for k in path)


def _checked_names(what: str, given: Sequence[str] | None, found: list[str]) -> list[str]:
    names = found if given is None else list(given)
    if len(names) != len(found) or len(set(names)) != len(names):
        raise ValueError(f"expected {len(found)} distinct {what} names, one per tensor like {found}, got {names}")
    return names


def _cloned(tree: Any) -> Any:
    return pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, tree)


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)
