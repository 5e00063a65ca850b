"""Run in a process of its own, with a lean TensorRT on the path: loads the plugin library as `how` says, prints JSON.

load      the registry loads it, gives it back, loads it again
dlopen    as Triton Inference Server and polygraphy do: the library registers itself
both      dlopen first, then the registry, which must not meet a creator twice
log       a creator's refusal through the logger of this TensorRT
"""

import ctypes
import json
import sys

import numpy as np
import tensorrt_lean_bindings as trt

KEY = ("GatedDeltaNet2", "1", "gdn2")
registry = trt.get_plugin_registry()


def creators() -> list[list]:
    """Ours: names, version and fields."""
    own = [c for c in registry.all_creators if (c.name, c.plugin_version, c.plugin_namespace) == KEY]
    return [[c.plugin_namespace, c.name, c.plugin_version, [field.name for field in c.field_names]] for c in own]


def create(*fields: trt.PluginField):
    collection = trt.PluginFieldCollection(list(fields))
    return registry.get_creator(*KEY).create_plugin("layer", collection, trt.TensorRTPhase.BUILD)


def scale(value: float) -> trt.PluginField:
    return trt.PluginField("scale", np.array([value], np.float32), trt.PluginFieldType.FLOAT32)


class Log(trt.ILogger):
    """Keeps what it is told."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.messages: list[list[str]] = []

    def log(self, severity, message: str) -> None:
        self.messages.append([severity.name, message])


def finder_of(log: Log):
    """An ILoggerFinder, as TensorRT hands one to a library: an object whose virtual table finds `log` everywhere."""
    value_pointer = 2 * ctypes.sizeof(ctypes.c_void_p)  # of an instance of pybind11: after the head of the object
    logger = ctypes.c_void_p.from_address(id(log) + value_pointer).value
    find = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(lambda self: logger)
    slots = (ctypes.c_void_p * 5)(*[ctypes.cast(find, ctypes.c_void_p)] * 5)
    finder = ctypes.c_void_p(ctypes.addressof(slots))
    return ctypes.byref(finder), (find, slots, finder)


def main(library: str, how: str) -> dict:
    seen = {"version": trt.__version__, "before": creators()}
    if how in ("dlopen", "both", "log"):
        opened = ctypes.CDLL(library)
        seen["after dlopen"] = creators()
    if how in ("load", "both"):
        handle = registry.load_library(library)
        seen["after load"] = creators()
        registry.deregister_library(handle)
        seen["after unload"] = creators()
        seen["loaded again"] = registry.load_library(library) is not None and creators()
    if how == "log":
        log = Log()
        finder, kept = finder_of(log)
        opened.setLoggerFinder(finder)
        seen["refused"] = create() is None
        seen["messages"] = log.messages
        del kept
    plugin = create(scale(0.5))
    capability = plugin.get_capability_interface(trt.PluginCapabilityType.BUILD)
    seen["plugin"] = [[x.interface_info.kind, x.interface_info.major] for x in (plugin, capability)]
    return seen


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
