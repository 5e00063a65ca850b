"""Run in a process of its own: our converters in the real Torch-TensorRT, on a network that only writes down.

On the path: Torch-TensorRT without its compiled parts, NVIDIA's bindings, the plugin registry of a lean runtime. Torch
here is a build for CPUs, so torch.cuda is answered for. Argument: the plugin library. Prints what was seen as JSON.
"""

import inspect
import json
import sys
import types

import tensorrt_bindings as trt
import torch

sys.modules["tensorrt"] = trt


class Properties:
    name, major, minor, total_memory = "none", 9, 0, 1


torch._C._CudaDeviceProperties = Properties
torch.cuda.is_available = lambda: True
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_name = lambda device=None: "none"
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.cuda.get_device_properties = lambda device=None: Properties()

from torch_tensorrt.dynamo.conversion import DYNAMO_CONVERTERS, converter_utils, impl  # noqa: E402

from gdn2_ops.export import torch_tensorrt  # noqa: E402

CALLS: list = []  # what was asked of Torch-TensorRT and of the network
FIELDS: list = []


class Tensor:
    """In place of an ITensor, which only a network makes."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.name, self.shape = name, shape


class Layer:
    def __init__(self, inputs: list[Tensor]) -> None:
        self.name, self._outputs = "", [Tensor("o", inputs[2].shape), Tensor("final_state", inputs[6].shape)]

    def get_output(self, index: int) -> Tensor:
        return self._outputs[index]


class Network:
    def add_plugin_v3(self, inputs, shape_inputs, plugin):
        assert isinstance(plugin, trt.IPluginV3)
        CALLS.append(["plugin", [[x.name, list(x.shape)] for x in inputs], list(shape_inputs)])
        return Layer(inputs)


def recorded(function, result):
    """In place of a function of Torch-TensorRT: the call must be one that the function takes."""
    signature = inspect.signature(function)

    def call(*args, **kwargs):
        return result(**signature.bind(*args, **kwargs).arguments)

    return call


def replace() -> None:
    def zeros(shape, fill_value, dtype, name, **others):
        CALLS.append(["full", [x if isinstance(x, int) else x.name for x in shape], fill_value, str(dtype)])
        return Tensor(name, tuple(x if isinstance(x, int) else -1 for x in shape))

    def unsqueezed(input, dim, **others):
        return Tensor(f"{input.name}+", (*input.shape[:dim], 1, *input.shape[dim:]))

    def squeezed(input, dim, **others):
        return Tensor(f"{input.name}-", input.shape[:dim] + input.shape[dim + 1 :])

    impl.full.full = recorded(impl.full.full, zeros)
    impl.shape.shape = recorded(
        impl.shape.shape, lambda input_val, dim, **others: Tensor(f"{input_val.name}[{dim}]", ())
    )
    impl.unsqueeze.unsqueeze = recorded(impl.unsqueeze.unsqueeze, unsqueezed)
    impl.squeeze.squeeze = recorded(impl.squeeze.squeeze, squeezed)
    converter_utils.get_trt_tensor = recorded(converter_utils.get_trt_tensor, lambda input_val, **others: input_val)
    real = trt.PluginField

    def field(name, data, kind):
        FIELDS.append([name, float(data[0]), str(data.dtype), str(kind)])
        return real(name, data, kind)

    field_types, trt.PluginField = trt.PluginFieldType, field
    assert field_types.FLOAT32 is not None


def chosen(target, *args):
    """The converter that Torch-TensorRT chooses for a node, or None: it stays in PyTorch."""
    graph = torch.fx.Graph()
    placeholders = [graph.placeholder(x.name) if isinstance(x, Tensor) else x for x in args]
    node = graph.call_function(target, tuple(placeholders))
    found = DYNAMO_CONVERTERS.get(node)
    return None if found is None else found[0]


def main(library: str) -> dict:
    torch_tensorrt.register(library)
    replace()
    chunk, step = torch.ops.gdn2.chunk.default, torch.ops.gdn2.step.default
    context = types.SimpleNamespace(net=Network())
    keys, values = (-1, -1, 2, 64), (-1, -1, 4, 32)
    x = [Tensor(name, shape) for name, shape in zip("qkvgbw", (keys, keys, values, keys, keys, values))]
    state, cu_seqlens = Tensor("state", (-1, 4, 64, 32)), Tensor("cu_seqlens", (3,))
    seen = {"packed": chosen(chunk, *x, None, cu_seqlens, 0.5) is None}
    outputs = []
    for target, args in (
        (chunk, (*x, state, None, 0.5)),
        (chunk, (*x, None, None, 0.25)),
        (step, (*(Tensor(y.name, (y.shape[0], *y.shape[2:])) for y in x), state, 2.0)),
    ):
        convert = chosen(target, *args)
        outputs.append([[y.name, list(y.shape)] for y in convert(context, target, args, {}, "node")])
    fixed = [Tensor(y.name, (3, 5, *y.shape[2:])) for y in x]
    named = dict(zip("qkvgbw", fixed)) | {"scale": 1.0}
    chosen(chunk, *fixed, None, None, 1.0)(context, chunk, (), named, "fixed")
    return seen | {"calls": CALLS, "fields": FIELDS, "outputs": outputs}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
