"""One ONNX file for every backend: `gdn2::GatedDeltaNet2` nodes with a function body in standard operators.

export(model, "model.onnx")                 a language model: prefill and decoding, any batch and length
translation_table()                         for those who call torch.onnx.export themselves
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

try:
    import onnx
    import onnx_ir as ir
    from onnxscript import opset21 as op
    from onnxscript.values import Op, Opset
except ImportError as error:
    raise ImportError(f"gdn2_ops.export.onnx needs {error.name}: pip install 'gdn2-ops[onnx]'") from error

from gdn2_ops.export.onnx_bodies import function_body
from gdn2_ops.export.onnx_schema import DOMAIN, IR_VERSION, OP, OPSET, PLUGIN, SCHEMA, VERSION
from gdn2_ops.export.program import flatten_language_model

_NODE = Op(Opset(DOMAIN, VERSION), OP, SCHEMA)


def export(model: nn.Module, file: str | Path, *, body: str = "chunk") -> Path:
    """Writes a language model as one ONNX file for prefill and decoding, over any batch and number of tokens.

    Inputs input_ids [batch, sequence] int64 and past.{i}.{conv,recurrent}; outputs logits [batch, sequence, vocab] and
    present.{i}.{conv,recurrent}. Before the first token states are zeros.

    Args:
        model: a `GDN2LM`, or any module that `export.program.flatten_language_model` takes, in evaluation mode.
        file: where to write; its folder must exist.
        body: of the operator: "chunk", "scan" or "linear_attention" (`export.onnx_bodies` says where each runs).
            Runtimes with a kernel for the node skip the body.

    Returns: the file's path.
    Raises: ValueError: an unknown body, or a model in training mode. ImportError: the extra `onnx` is not installed.
    """
    function_body(body, heads=1)  # an unknown one is refused before the export, which takes seconds
    if model.training:
        raise ValueError("gdn2_ops.export.onnx: expected a model in evaluation mode, got training; call model.eval()")
    flat = flatten_language_model(model)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            flat.module,
            flat.args,
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            dynamic_shapes=flat.dynamic_shapes,
            input_names=flat.input_names,
            output_names=flat.output_names,
            custom_translation_table=translation_table(),
        )
    assert program is not None
    attach_body(program.model, body)
    strip_local_traces(program.model)
    program.model.ir_version = IR_VERSION
    program.model.producer_name = "gdn2-ops"
    program.model.doc_string = f"{type(model).__name__}: prefill and decoding in one graph."
    proto = ir.serde.serialize_model(program.model)
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, os.fspath(file))
    return Path(file)


def translation_table() -> dict[Callable, Callable]:
    """`custom_translation_table` for torch.onnx.export(dynamo=True): our operators to `gdn2::GatedDeltaNet2` nodes."""
    ops = torch.ops.gdn2
    return {
        ops.chunk.default: _translate_chunk,
        ops.step.default: _translate_step,
        ops.step_inplace.default: _translate_step_inplace,
    }


def attach_body(model: ir.Model, body: str) -> None:
    """Adds a function body for the nodes; after the export, for the exporter inlines the functions it knows.

    Raises: ValueError: no such body, no node to serve, or nodes of different numbers of key heads.
    """
    heads = {node.inputs[0].shape[2] for node in _nodes(model.graph) if (node.domain, node.op_type) == (DOMAIN, OP)}
    if len(heads) != 1:
        raise ValueError(f"expected {DOMAIN}::{OP} nodes with one number of key heads, got {sorted(heads)}")
    function = ir.serde.deserialize_function(function_body(body, heads.pop()))
    model.functions[function.identifier()] = function
    for domain, version in function.opset_imports.items():
        model.graph.opset_imports.setdefault(domain, version)
    model.graph.opset_imports.setdefault(DOMAIN, VERSION)


def strip_local_traces(model: ir.Model) -> None:
    """Removes what the exporter notes about the Python source: it names files of the machine that exported."""
    for node in _nodes(model.graph):
        node.metadata_props.clear()
        node.doc_string = None
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


def _translate_chunk(q, k, v, g, b, w, state, cu_seqlens, scale):
    if cu_seqlens is not None:
        raise NotImplementedError(
            "gdn2_ops.export.onnx: expected gdn2::chunk without cu_seqlens, got packed sequences; "
            "export with one sequence per batch row"
        )
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


def _translate_step_inplace(*args, **kwargs):
    raise NotImplementedError(
        "gdn2_ops.export.onnx: expected operators without mutation, got gdn2::step_inplace; use gdn2_ops.step, whose "
        "state is an input and an output of the graph"
    )


def _nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    return ir.traversal.RecursiveGraphIterator(graph)


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
