"""TensorRT-RTX's ahead-of-time builder, which needs no GPU: does its parser take the file, does an engine come out?

Its engines run on GeForce and RTX GPUs only, so nothing is run here. It takes no plugins: it builds the body.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Engine:
    """What was built: version of TensorRT-RTX, layers of the network, bytes of the engine, seconds."""

    version: str
    layers: int
    size: int
    seconds: float


def build(model: bytes, sizes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]) -> Engine:
    """Builds an engine for compute capability 8.9.

    Args:
        model: a serialised model with its weights.
        sizes: the smallest, the usual and the largest shape of every input.

    Raises: ImportError: tensorrt_rtx is not installed. RuntimeError: the parser or the builder refuses the model.
    """
    try:
        import tensorrt_rtx as rtx
    except ImportError as error:
        raise ImportError("gdn2_ops.runtime.tensorrt_rtx needs tensorrt_rtx: pip install tensorrt_rtx") from error
    began = time.perf_counter()
    errors: list[str] = []

    class Log(rtx.ILogger):
        def log(self, severity: rtx.ILogger.Severity, message: str) -> None:
            if severity <= rtx.ILogger.ERROR:
                errors.append(message)

    log = Log()
    builder = rtx.Builder(log)
    network = builder.create_network(0)
    parser = rtx.OnnxParser(network, log)
    if not parser.parse(model):
        raise RuntimeError("; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(rtx.ComputeCapability.SM89, 0)
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        profile.set_shape(network.get_input(i).name, *sizes[network.get_input(i).name])
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise RuntimeError("; ".join(errors) or "the builder returned no engine")
    return Engine(rtx.__version__, network.num_layers, engine.nbytes, time.perf_counter() - began)
