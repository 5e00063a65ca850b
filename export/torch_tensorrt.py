"""Torch-TensorRT: torch.ops.gdn2.chunk and step become our plugin in the engines of a compiled module.

    gdn2_ops.export.torch_tensorrt.register()
    torch_tensorrt.compile(module, ...)

A call with packed sequences (cu_seqlens) and gdn2::step_inplace have no converter: they stay in PyTorch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from gdn2_ops.export.onnx_schema import OP
from gdn2_ops.runtime import tensorrt_library

_TOKENS = 1  # the axis of the plugin's tensors that a step does not have


def register(plugin: str | Path | None = None) -> None:
    """Loads the plugin into this process and adds the converters; once, before torch_tensorrt.compile, and in every
    process that loads such an engine.

    Args:
        plugin: the library; None is the one of `gdn2 build-plugin`.

    Raises: ImportError: no torch_tensorrt, or no plugin. RuntimeError: TensorRT refuses the plugin.
    """
    try:
        import tensorrt as trt
        from torch_tensorrt.dynamo.conversion import dynamo_tensorrt_converter
    except ImportError as error:
        raise ImportError("gdn2_ops.export.torch_tensorrt needs torch_tensorrt: pip install torch-tensorrt") from error
    tensorrt_library.load(trt, plugin or tensorrt_library.path(), tensorrt_library.error_log(trt))
    dynamo_tensorrt_converter(
        torch.ops.gdn2.chunk.default, capability_validator=is_not_packed, supports_dynamic_shapes=True
    )(convert_chunk)
    dynamo_tensorrt_converter(torch.ops.gdn2.step.default, supports_dynamic_shapes=True)(convert_step)


def is_not_packed(node: torch.fx.Node, settings: Any = None) -> bool:
    """Whether a gdn2::chunk node has a converter."""
    return _arguments(node.target, node.args, node.kwargs)["cu_seqlens"] is None


def convert_chunk(ctx: Any, target: Any, args: tuple, kwargs: dict[str, Any], name: str) -> tuple[Any, Any]:
    """A converter of Torch-TensorRT: o and the final state of one plugin layer, zeros before it where no state is."""
    given = _arguments(target, args, kwargs)
    inputs = _tensors(ctx, given, name)
    if given["state"] is None:
        inputs.append(_zeros(ctx, target, inputs, name))
    return _add_plugin(ctx, inputs, given["scale"], target, name)


def convert_step(ctx: Any, target: Any, args: tuple, kwargs: dict[str, Any], name: str) -> tuple[Any, Any]:
    """The same for one token."""
    from torch_tensorrt.dynamo._SourceIR import SourceIR
    from torch_tensorrt.dynamo.conversion import impl

    given = _arguments(target, args, kwargs)
    *token, state = _tensors(ctx, given, name)
    inputs = [
        impl.unsqueeze.unsqueeze(ctx, target, SourceIR.ATEN, f"{name}_token_{i}", x, _TOKENS)
        for i, x in enumerate(token)
    ]
    o, final_state = _add_plugin(ctx, [*inputs, state], given["scale"], target, name)
    return impl.squeeze.squeeze(ctx, target, SourceIR.ATEN, f"{name}_o", o, _TOKENS), final_state


def _arguments(target: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """By the names of the operator's schema; what is not given is None."""
    names = [argument.name for argument in target._schema.arguments]
    return dict.fromkeys(names) | dict(zip(names, args)) | kwargs


def _tensors(ctx: Any, given: dict[str, Any], name: str) -> list[Any]:
    """Those of the network, in the plugin's order; weights become constants."""
    from torch_tensorrt.dynamo.conversion.converter_utils import get_trt_tensor

    names = ("q", "k", "v", "g", "b", "w", "state")
    return [get_trt_tensor(ctx, given[x], f"{name}_{x}") for x in names if given[x] is not None]


def _zeros(ctx: Any, target: Any, inputs: list[Any], name: str) -> Any:
    """A state [B, HV, K, V] of zeros; B may be dynamic."""
    from torch_tensorrt.dynamo._SourceIR import SourceIR
    from torch_tensorrt.dynamo.conversion import impl

    q, v = inputs[0], inputs[2]
    batch = q.shape[0]
    if batch < 0:
        batch = impl.shape.shape(ctx, target, SourceIR.ATEN, f"{name}_batch", q, 0)
    sizes = [batch, v.shape[2], q.shape[3], v.shape[3]]
    return impl.full.full(ctx, target, SourceIR.ATEN, f"{name}_zeros", sizes, 0.0, dtype=torch.float32)


def _add_plugin(ctx: Any, inputs: list[Any], scale: float, target: Any, name: str) -> tuple[Any, Any]:
    import tensorrt as trt

    field = trt.PluginField("scale", np.array([scale], np.float32), trt.PluginFieldType.FLOAT32)
    fields = trt.PluginFieldCollection([field])
    creator = trt.get_plugin_registry().get_creator(*tensorrt_library.CREATOR)
    plugin = creator.create_plugin(name, fields, trt.TensorRTPhase.BUILD)
    layer = ctx.net.add_plugin_v3(inputs, [], plugin)
    if layer is None:
        raise RuntimeError(f"{target}: TensorRT refuses the plugin {OP} for {name}; its logger says why")
    layer.name = f"{name}-{OP}"
    return layer.get_output(0), layer.get_output(1)
