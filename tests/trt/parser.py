"""Run in a process of its own, with TensorRT-RTX on the path: its ONNX parser meets a file, messages go to the output.

With a library, the parser finds the plugin in it and then ends the process (SIGABRT): TensorRT-RTX has the parser of
TensorRT but no layers for plugins. What counts is its message before that. Without, the body is built.
"""

import sys
from pathlib import Path

import tensorrt_rtx as trt

from gdn2_ops.runtime import tensorrt_rtx


class Log(trt.ILogger):
    def __init__(self) -> None:
        trt.ILogger.__init__(self)

    def log(self, severity, message: str) -> None:
        if severity <= trt.ILogger.WARNING or "plugin" in message.lower():
            print(severity.name, message, flush=True)


def parse(model: bytes, library: str) -> None:
    log = Log()
    builder = trt.Builder(log)
    assert trt.get_plugin_registry().load_library(library) is not None
    network = builder.create_network(0)  # the parser keeps no reference to it
    parser = trt.OnnxParser(network, log)
    parsed = parser.parse(model)
    print("parsed", parsed, [parser.get_error(i).desc() for i in range(parser.num_errors)], flush=True)


def sizes(B: int, T: int, states: list[list[int]]) -> list[tuple[int, ...]]:
    return [(B, T), *((B, *state) for state in states)]


def build(model: bytes) -> None:
    import onnx

    inputs = onnx.load_from_string(model).graph.input
    axes = {x.name: [axis.dim_value for axis in x.type.tensor_type.shape.dim] for x in inputs}
    states = [axes[x.name][1:] for x in inputs[1:]]
    profiles = zip(*(sizes(B, T, states) for B, T in ((1, 1), (1, 64), (4, 512))))
    engine = tensorrt_rtx.build(model, dict(zip(axes, profiles)))
    print(f"built {engine.size} bytes of {engine.layers} layers for TensorRT-RTX {engine.version}")


if __name__ == "__main__":
    model = Path(sys.argv[1]).read_bytes()
    parse(model, sys.argv[2]) if len(sys.argv) > 2 else build(model)
