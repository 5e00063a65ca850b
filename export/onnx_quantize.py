"""int8 weights for the projections of an exported file, by ONNX Runtime's dynamic quantization.

Measured on examples/models/tiny: docs/onnx.md.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx


def quantize_int8(source: str | Path, file: str | Path) -> Path:
    """Writes a copy of a file whose matrix products with constant weights are of 8 bits, a scale for each column.

    Activations are rounded when the file runs, by their own range. `gdn2::GatedDeltaNet2` nodes and their bodies,
    norms, convolutions and tied embeddings stay as they are. Weights are unsigned, for signed ones overflow on
    processors without VNNI.

    Args:
        source: what `export.onnx.export` wrote, of float32.
        file: where to write.

    Returns: the file's path.
    Raises: ValueError: source is of another type. ImportError: onnxruntime is not installed.
    """
    try:
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise ImportError("gdn2_ops.export.onnx_quantize needs onnxruntime: pip install 'gdn2-ops[onnx]'") from error
    before = onnx.load(source, load_external_data=False)
    types = {x.data_type for x in before.graph.initializer}
    if types & {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}:
        raise ValueError(f"expected a float32 file to quantize, got 16-bit weights in {source}; leave out dtype")
    external = any(x.data_location == onnx.TensorProto.EXTERNAL for x in before.graph.initializer)
    with _quiet():
        quantize_dynamic(
            source,
            file,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QUInt8,
            use_external_data_format=external,
        )
    after = onnx.load(file, load_external_data=False)
    after.producer_name, after.producer_version = before.producer_name, before.producer_version
    after.doc_string = before.doc_string + " Its projections have weights of 8 bits."
    del after.metadata_props[:]
    note = onnx.StringStringEntryProto(key="gdn2.quantize", value="int8")
    after.metadata_props.extend([*before.metadata_props, note])
    onnx.save(after, file)
    return Path(file)


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantizer advises every caller to run its preprocessing, which does not know our node."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
