"""The weights of a file: laid out as matrix products read them, and beside the file where they are too large for it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from gdn2_ops.export.onnx_schema import register_schema

LARGEST_FILE = 2**31 - 2**24  # a protocol buffer ends at 2 GiB; the rest is for nodes and shapes


def transpose_weights(graph: ir.Graph) -> None:
    """Puts transposed matrices in place of matrices that are transposed: the exporter does so with small ones only.

    A session would copy them when it loads, and quantizers leave alone what is no constant. Each is transposed when it
    is written, so that one at a time is in memory. A matrix that is read as it is as well, like tied embeddings, stays.
    """
    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        tensor = weight.const_value if weight is not None and weight.is_initializer() else None
        if weight is None or tensor is None or len(tensor.shape) != 2:
            continue
        perm = node.attributes.get("perm")  # of a matrix only [0, 1] leaves it as it is
        if perm is not None and list(perm.as_ints()) == [0, 1]:
            continue
        if len(weight.uses()) != 1 or weight.is_graph_output() or node.outputs[0].is_graph_output():
            continue
        rows, columns = tensor.shape.numpy()
        transposed = ir.LazyTensor(
            lambda matrix=tensor: ir.tensor(np.ascontiguousarray(matrix.numpy().T)),
            dtype=tensor.dtype,
            shape=ir.Shape([columns, rows]),
        )
        value = ir.Value(
            name=f"{weight.name}.T", shape=transposed.shape, type=ir.TensorType(tensor.dtype), const_value=transposed
        )
        graph.register_initializer(value)
        ir.convenience.replace_all_uses_with(node.outputs[0], value)
        graph.remove(node, safe=True)
        graph.initializers.pop(str(weight.name))


def write(model: ir.Model, file: Path, external_data: bool | None) -> None:
    """Writes and checks the file; what the checker refuses is removed. external_data: None is where it has to be."""
    weights = sum(x.const_value.nbytes for x in model.graph.initializers.values() if x.const_value is not None)
    external = weights > LARGEST_FILE if external_data is None else external_data
    data = file.with_name(file.name + ".data")
    register_schema()
    try:
        ir.save(model, os.fspath(file), external_data=data.name if external else None)
        onnx.checker.check_model(os.fspath(file), full_check=True)
    except BaseException:
        for path in (file, data):
            path.unlink(missing_ok=True)
        raise
