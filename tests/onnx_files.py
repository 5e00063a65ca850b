"""Files and sessions that the tests of ONNX share."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import torch
from cases import Inputs
from onnx import helper

from gdn2_ops.export.onnx_bodies import function_body
from gdn2_ops.export.onnx_schema import DOMAIN, INPUTS, IR_VERSION, OP, OUTPUTS, PLUGIN
from gdn2_ops.runtime import onnxruntime_library

SCALE = 0.5
AXES = dict.fromkeys("qkgb", "B T H K") | dict.fromkeys("vwo", "B T HV V")
AXES |= dict.fromkeys(("initial_state", "final_state"), "B HV K V")


def one_node(body: str | onnx.FunctionProto, **sizes: int) -> onnx.ModelProto:
    """A model of nothing but the node; an axis without a size is dynamic."""
    value = {
        name: helper.make_tensor_value_info(
            name, onnx.TensorProto.FLOAT, [sizes.get(axis, axis) for axis in AXES[name].split()]
        )
        for name in AXES
    }
    node = helper.make_node(OP, INPUTS, OUTPUTS, domain=DOMAIN, scale=SCALE, **PLUGIN)
    graph = helper.make_graph([node], "one", [value[n] for n in INPUTS], [value[n] for n in OUTPUTS])
    function = function_body(body) if isinstance(body, str) else body
    opsets = [helper.make_opsetid(DOMAIN, 1), *function.opset_import]
    return helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=IR_VERSION)


def session(
    file: onnx.ModelProto | bytes | str, *, library: bool = False, threads: int = 1, optimise: bool = True
) -> onnxruntime.InferenceSession:
    """In ONNX Runtime on the CPU, stock or with our kernels."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if library:
        onnxruntime_library.register(options)
    model = file.SerializeToString() if isinstance(file, onnx.ModelProto) else file
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def feed(x: Inputs) -> dict[str, np.ndarray]:
    """The inputs of `one_node`; a state of None is zeros."""
    B, _, HV, V = x.v.shape
    state = torch.zeros(B, HV, x.q.shape[-1], V) if x.state is None else x.state
    return {name: y.float().numpy() for name, y in zip(INPUTS, (*x[:6], state))}


def run_in_one_buffer(
    run: onnxruntime.InferenceSession, inputs: dict[str, np.ndarray], states: dict[str, str]
) -> dict[str, np.ndarray]:
    """All outputs of a run whose states {input: output} are each bound to one buffer."""
    memory = {name: y.copy() for name, y in inputs.items()}  # an OrtValue does not keep it alive
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(y) for name, y in memory.items()}
    binding = run.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    bound = {after: values[before] for before, after in states.items()}
    for output in run.get_outputs():
        if output.name in bound:
            binding.bind_ortvalue_output(output.name, bound[output.name])
        else:
            binding.bind_output(output.name)
    run.run_with_iobinding(binding)
    names = [output.name for output in run.get_outputs()]
    return {name: value.numpy().copy() for name, value in zip(names, binding.get_outputs())}
