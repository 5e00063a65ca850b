"""One ONNX file for every backend: `gdn2::GatedDeltaNet2` nodes with a function body in standard operators.

export(model, "model.onnx")                 a language model: prefill and decoding, any batch and length
export(module, "module.onnx", args)         any module that calls gdn2_ops.chunk or gdn2_ops.step
translation_table(), attach_body(...)       for those who call torch.onnx.export themselves
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

try:
    import onnx
    import onnx_ir as ir
    from onnxscript import opset18 as op  # the exporter raises versions, it does not lower them
    from onnxscript.values import Op, Opset
except ImportError as error:
    raise ImportError(f"gdn2_ops.export.onnx needs {error.name}: pip install 'gdn2-ops[onnx]'") from error

from gdn2_ops.export.onnx_bodies import NONE, function_body
from gdn2_ops.export.onnx_reading import describe
from gdn2_ops.export.onnx_schema import (
    DOMAIN,
    INPUTS,
    OP,
    OPSET,
    OPSETS,
    OUTPUTS,
    PLUGIN,
    SCHEMA,
    VERSION,
)
from gdn2_ops.export.onnx_weights import transpose_weights, write
from gdn2_ops.export.program import STATE_NAMES, FlatProgram, flatten_language_model, flatten_module

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_NODE = Op(Opset(DOMAIN, VERSION), OP, SCHEMA)


def export(
    module: nn.Module,
    file: str | Path,
    args: Sequence[Any] | None = None,
    *,
    body: str = "chunk",
    opset: int = OPSET,
    dtype: torch.dtype | None = None,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    state_names: str = STATE_NAMES,
    external_data: bool | None = None,
) -> Path:
    """Writes a module that calls the operators as one ONNX file.

    A language model needs no more than the file: inputs input_ids [batch, sequence] int64 and the states, outputs
    logits [batch, sequence, vocab] float32 and the states, for prefill and decoding over any batch and number of
    tokens. Before the first token states are zeros. Any other module needs args, and what its dimensions are.

    Args:
        module: in evaluation mode; left as it is. A language model is what `flatten_language_model` takes.
        file: where to write; its folder must exist.
        args: example arguments of a module that is no language model, as `flatten_module` takes them.
        body: of the operator: "chunk", "scan", "linear_attention" or "none" (`export.onnx_bodies` says where each
            runs). Runtimes with a kernel for the node skip the body.
        opset: of the standard operators, 18 to 25.
        dtype: float32, float16 or bfloat16, of the parameters; None leaves them. Decays and states of the operators are
            float32 whatever it is. args are taken in the types they have.
        dynamic, input_names, output_names: with args, as in `flatten_module`.
        state_names: without args, as in `flatten_language_model`.
        external_data: weights beside the file, in `<file>.data`. None: where they are too large for one file.

    Returns: the file's path.
    Raises: ValueError, TypeError, NotImplementedError: an argument does not match the list above, the module is in
        training mode, calls no operator of ours, or calls one in a way that a graph cannot hold.
    """
    _check(module, body, opset, dtype)
    module = module if dtype is None else _cast(module, dtype)
    if args is None:
        if dynamic is not None or input_names is not None or output_names is not None:
            raise ValueError(
                "expected args with dynamic, input_names and output_names; a language model has state_names"
            )
        flat = flatten_language_model(module, state_names=state_names)
    else:
        flat = flatten_module(module, args, dynamic=dynamic, input_names=input_names, output_names=output_names)
    model = _translate(flat, opset)
    attach_body(model, body)
    transpose_weights(model.graph)
    describe(model, type(module).__name__, body)
    model.ir_version = onnx.helper.find_min_ir_version_for(
        [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()], True
    )
    write(model, Path(file), external_data)
    return Path(file)


def translation_table() -> dict[Callable, Callable]:
    """`custom_translation_table` for torch.onnx.export(dynamo=True).

    Our operators become `gdn2::GatedDeltaNet2` nodes. softplus, of which decays are made, becomes operators that ONNX
    Runtime vectorises: its Softplus takes four times as long as what it stands for.
    """
    ops = torch.ops.gdn2
    return {
        torch.ops.aten.softplus.default: _translate_softplus,
        ops.chunk.default: _translate_chunk,
        ops.step.default: _translate_step,
        ops.step_inplace.default: _translate_step_inplace,
    }


def attach_body(model: ir.Model, body: str) -> None:
    """Adds a function body for the nodes; after the export, for the exporter inlines the functions it knows.

    Raises: ValueError: no such body, no node to serve, or a node without one of its inputs or outputs.
    """
    nodes = [
        node for node in ir.traversal.RecursiveGraphIterator(model.graph) if (node.domain, node.op_type) == (DOMAIN, OP)
    ]
    if not nodes:
        raise ValueError(f"expected a module that calls gdn2_ops.chunk or gdn2_ops.step, got no {DOMAIN}::{OP} node")
    for node in nodes:
        if [len(node.inputs), len(node.outputs)] != [len(INPUTS), len(OUTPUTS)] or None in node.inputs:
            raise ValueError(
                f"expected node {node.name!r} with the inputs {INPUTS} and outputs {OUTPUTS}, all named, "
                f"got {[x and x.name for x in node.inputs]} and {[x.name for x in node.outputs]}"
            )
        node.inputs[-1].shape = node.outputs[-1].shape  # of zeros of a dynamic shape onnx infers [0, 0, 0, 0]
    model.graph.opset_imports.setdefault(DOMAIN, VERSION)
    if body == NONE:
        return
    function = ir.serde.deserialize_function(function_body(body, model.graph.opset_imports[""]))
    model.functions[function.identifier()] = function
    for domain, version in function.opset_imports.items():
        model.graph.opset_imports.setdefault(domain, version)


def _check(module: nn.Module, body: str, opset: int, dtype: torch.dtype | None) -> None:
    """What can be refused before the export, which takes seconds."""
    if body != NONE:
        function_body(body)
    if opset not in OPSETS:
        raise ValueError(f"expected an opset in {OPSETS.start}..{OPSETS.stop - 1}, got {opset}")
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"expected dtype float32, float16 or bfloat16, got {dtype}")
    if module.training:
        raise ValueError("gdn2_ops.export.onnx: expected a module in evaluation mode, got training; call .eval()")


def _cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy with floating parameters and buffers of that type, made one tensor at a time."""
    memo: dict[int, Any] = {}
    for x in (*module.parameters(), *module.buffers()):
        cast = x.detach().to(dtype) if x.is_floating_point() else x.detach()
        memo[id(x)] = nn.Parameter(cast, requires_grad=False) if isinstance(x, nn.Parameter) else cast
    return copy.deepcopy(module, memo)


def _translate(flat: FlatProgram, opset: int) -> ir.Model:
    with _quiet(), torch.no_grad():
        exported = flat.exported()
        _refuse(exported)
        program = torch.onnx.export(
            exported,
            dynamo=True,
            verbose=False,
            opset_version=opset,
            dynamic_shapes=flat.dynamic_shapes,
            input_names=flat.input_names,
            output_names=flat.output_names,
            custom_translation_table=translation_table(),
        )
    assert program is not None
    return program.model


def _refuse(exported: torch.export.ExportedProgram) -> None:
    """Calls that a node cannot hold, in our words, before the exporter wraps them in its own."""
    for graph in exported.graph_module.modules():
        for node in graph.graph.nodes if isinstance(graph, torch.fx.GraphModule) else ():
            if node.target is torch.ops.gdn2.step_inplace.default:
                _translate_step_inplace()
            if node.target is torch.ops.gdn2.chunk.default:
                _refuse_packed(node.args[7] if len(node.args) > 7 else node.kwargs.get("cu_seqlens"))


def _translate_chunk(q, k, v, g, b, w, state, cu_seqlens, scale):
    _refuse_packed(cu_seqlens)
    if state is None:
        shape = op.Concat(
            op.Shape(q, start=0, end=1), op.Shape(v, start=2, end=3), op.Shape(q, start=3), op.Shape(v, start=3), axis=0
        )
        state = op.ConstantOfShape(shape)
    return _NODE(q, k, v, g, b, w, state, scale=scale, **PLUGIN)


def _translate_step(q, k, v, g, b, w, state, scale):
    tokens = op.Constant(value_ints=[1])
    sequences = [op.Unsqueeze(x, tokens) for x in (q, k, v, g, b, w)]
    o, final_state = _NODE(*sequences, state, scale=scale, **PLUGIN)
    return op.Squeeze(o, tokens), final_state


def _refuse_packed(cu_seqlens: Any) -> None:
    if cu_seqlens is not None:
        raise NotImplementedError(
            "gdn2_ops.export.onnx: expected gdn2::chunk without cu_seqlens, got packed sequences; "
            "export with one sequence per batch row"
        )


def _translate_step_inplace(*args, **kwargs):
    raise NotImplementedError(
        "gdn2_ops.export.onnx: expected operators without mutation, got gdn2::step_inplace; use gdn2_ops.step, whose "
        "state is an input and an output of the graph"
    )


def _translate_softplus(x, beta=1, threshold=20):
    y = op.Mul(x, op.CastLike(op.Constant(value_float=float(beta)), x)) if beta != 1 else x
    one = op.CastLike(op.Constant(value_float=1.0), x)
    y = op.Add(op.Relu(y), op.Log(op.Add(op.Exp(op.Neg(op.Abs(y))), one)))  # no overflow, so no need of a threshold
    return op.Div(y, op.CastLike(op.Constant(value_float=float(beta)), x)) if beta != 1 else y


@contextmanager
def _quiet() -> Iterator[Any]:
    """The exporter's notes about its own internals are not for the caller; errors still are."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", message="# The axis name")
            yield
    finally:
        logger.setLevel(level)
