"""Run in a process of its own, with TensorRT-RTX on the path as `tensorrt`: gdn2_ops.export.tensorrt builds with it.

What TensorRT-RTX needs besides: the compute capability to build for, where there is no GPU to ask. Arguments: ONNX
file, plan and timing cache to write. Prints what was built and said, as JSON.
"""

import json
import sys
import types
from pathlib import Path

import tensorrt_rtx as rtx


class Builder(rtx.Builder):
    def create_builder_config(self):
        config = super().create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(rtx.ComputeCapability.SM89, 0)
        return config


def main(file: str, plan: str, cache: str) -> dict:
    module = types.ModuleType("tensorrt")
    module.__dict__.update({name: getattr(rtx, name) for name in dir(rtx) if not name.startswith("__")})
    module.Builder, module.__version__ = Builder, rtx.__version__
    sys.modules["tensorrt"] = module
    from gdn2_ops.export import tensorrt
    from gdn2_ops.export import tensorrt_commands as commands

    tensorrt.Driver = object
    profiles, said = commands.Sizes(4, 64).profiles(commands.read_inputs(file)), []
    options = {"plugin": None, "timing_cache": cache}
    built = tensorrt.build(file, plan, profiles, **options, report=lambda what, part: said.append((what, part)))
    seen = {"layers": built.layers, "size": built.size, "said": said}
    try:
        tensorrt.build(cache, plan + ".none", profiles, **options)
    except RuntimeError as error:
        seen["refused"] = str(error)

    def interrupt(what: str, part: float) -> None:
        raise KeyboardInterrupt

    try:
        tensorrt.build(file, plan + ".none", profiles, plugin=None, report=interrupt)
    except KeyboardInterrupt:
        seen["cancelled"] = not Path(plan + ".none").exists()
    return seen


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
