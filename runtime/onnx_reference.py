"""ONNX files in onnx's own evaluator: slow, in numpy, nothing optimised, so that others can be compared with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gdn2_ops.runtime.runner import Port

if TYPE_CHECKING:
    import onnx


class OnnxReference:
    """A `runtime.runner.Runner` in onnx.reference.

    Args:
        model: with its weights in memory.

    Raises: ValueError: it has operators of a vendor. ImportError: onnx is not installed.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        try:
            from onnx import helper
            from onnx.reference import ReferenceEvaluator
        except ImportError as error:
            raise ImportError("gdn2_ops.runtime.onnx_reference needs onnx: pip install 'gdn2-ops[onnx]'") from error
        known = {"", "ai.onnx", *(f.domain for f in model.functions)}
        nodes = [*model.graph.node, *(node for f in model.functions for node in f.node)]
        foreign = sorted({f"{node.domain}::{node.op_type}" for node in nodes if node.domain not in known})
        if foreign:
            raise ValueError(f"expected standard operators, got {', '.join(foreign)}, which onnx does not evaluate")

        def port(x: onnx.ValueInfoProto) -> Port:
            axes = x.type.tensor_type.shape.dim
            dtype = helper.tensor_dtype_to_np_dtype(x.type.tensor_type.elem_type)
            shape = (d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in axes)
            return Port(x.name, dtype.name, tuple(shape))

        self.inputs, self.outputs = [port(x) for x in model.graph.input], [port(x) for x in model.graph.output]
        self._evaluator = ReferenceEvaluator(model)

    def run(self, feed: dict[str, NDArray]) -> list[NDArray]:
        with np.errstate(all="ignore"):
            return self._evaluator.run(None, feed)
