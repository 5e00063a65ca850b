"""A stand-in for the Python package `tensorrt`: what gdn2_ops uses of it, on a CPU. Engines are run by ONNX Runtime.

test_5_builder.py holds every name, parameter and number in here against NVIDIA's bindings. A plan is a JSON object.
Device memory is that of standin_cuda.cpp. GDN2_TRT_LOG: a file that what is built and run is appended to.
"""

from __future__ import annotations

import ctypes
import enum
import json
import os

import numpy as np

__version__ = "0.0.0"
_BLOCK = 1 << 16  # bytes that an engine asks for


def _note(**what) -> None:
    if "GDN2_TRT_LOG" in os.environ:
        with open(os.environ["GDN2_TRT_LOG"], "a") as log:
            log.write(json.dumps(what) + "\n")


class DataType(enum.IntEnum):
    FLOAT, HALF, INT32, INT64, BF16 = 0, 1, 3, 8, 7


class TensorIOMode(enum.IntEnum):
    INPUT, OUTPUT = 1, 2


class LayerType(enum.IntEnum):
    PLUGIN_V3 = 46


class BuilderFlag(enum.Enum):  # numbers differ between versions
    TF32 = enum.auto()


class NetworkDefinitionCreationFlag(enum.Enum):
    STRONGLY_TYPED = 1

    def __int__(self) -> int:
        return self.value


class ExecutionContextAllocationStrategy(enum.IntEnum):
    USER_MANAGED = 2


class ILogger:
    class Severity(enum.IntEnum):
        INTERNAL_ERROR, ERROR, WARNING = 0, 1, 2

    INTERNAL_ERROR, ERROR, WARNING = Severity.INTERNAL_ERROR, Severity.ERROR, Severity.WARNING

    def log(self, severity, msg) -> None:
        raise NotImplementedError


class IProgressMonitor:
    def phase_start(self, phase_name, parent_phase, num_steps) -> None: ...
    def step_complete(self, phase_name, step) -> bool: ...
    def phase_finish(self, phase_name) -> None: ...


class IPluginRegistry:
    def __init__(self) -> None:
        self._libraries: list[str] = []

    def load_library(self, plugin_path):
        """As TensorRT: None for a library that it has already, or that it refuses."""
        if plugin_path in self._libraries or not os.path.isfile(plugin_path):
            return None
        self._libraries.append(plugin_path)
        return plugin_path

    def get_creator(self, type, version, plugin_namespace=""):
        wanted = (type, version, plugin_namespace) == ("GatedDeltaNet2", "1", "gdn2")
        return "creator" if wanted and self._libraries else None


_REGISTRY = IPluginRegistry()


def get_plugin_registry():
    return _REGISTRY


class ITensor:
    def __init__(self, name: str) -> None:
        self.name = name


class ILayer:
    def __init__(self, type) -> None:
        self.type = type


class INetworkDefinition:
    def __init__(self, flags: int) -> None:
        self._flags, self._file, self._inputs, self._layers = flags, "", [], []

    @property
    def num_inputs(self):
        return len(self._inputs)

    @property
    def num_layers(self):
        return len(self._layers)

    def get_input(self, index):
        return ITensor(self._inputs[index])

    def get_layer(self, index):
        return ILayer(self._layers[index])


class ParserError:
    def desc(self):
        return "In node 0 (stand-in): the file is no ONNX model"


class OnnxParser:
    def __init__(self, network, logger) -> None:
        self._network, self.num_errors = network, 0

    def get_error(self, index):
        return ParserError()

    def parse_from_file(self, model):
        import onnx

        try:
            graph = onnx.load(model).graph
        except Exception:
            self.num_errors = 1
            return False
        net = self._network
        net._file, net._inputs = model, [x.name for x in graph.input]
        ours = get_plugin_registry().get_creator("GatedDeltaNet2", "1", "gdn2") is not None
        is_ours = [(node.domain, node.op_type) == ("gdn2", "GatedDeltaNet2") for node in graph.node]
        net._layers = [LayerType.PLUGIN_V3 if ours and x else None for x in is_ours]
        return True


class IOptimizationProfile:
    def __init__(self) -> None:
        self._shapes: dict[str, list[tuple[int, ...]]] = {}

    def set_shape(self, input, min, opt, max) -> None:
        if not len(min) == len(opt) == len(max) or any(not a <= b <= c for a, b, c in zip(min, opt, max)):
            raise ValueError("min <= opt <= max")
        self._shapes[input] = [min, opt, max]


class ITimingCache:
    def __init__(self, known: bytes) -> None:
        self._known = known

    def serialize(self):
        return b"timed" if self._known in (b"", b"timed") else self._known


class IBuilderConfig:
    def __init__(self) -> None:
        self._cleared, self._profiles, self._cache = [], [], None
        self.progress_monitor = None

    def clear_flag(self, flag) -> None:
        self._cleared.append(flag.name)

    def add_optimization_profile(self, profile):
        self._profiles.append(profile._shapes)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache):
        return ITimingCache(bytes(serialized_timing_cache))

    def set_timing_cache(self, cache, ignore_mismatch):
        """As TensorRT: a cache of another device is refused."""
        if cache._known not in (b"", b"timed"):
            return False
        self._cache = cache
        return True


class Builder:
    def __init__(self, logger) -> None:
        self._logger = logger

    def create_network(self, flags=0):
        return INetworkDefinition(flags)

    def create_builder_config(self):
        return IBuilderConfig()

    def create_optimization_profile(self):
        return IOptimizationProfile()

    def build_serialized_network(self, network, config):
        monitor = config.progress_monitor
        monitor.phase_start("Building engine", None, 2)
        for step in range(2):
            monitor.phase_start(f"Timing {step}", "Building engine", 2)
            for inner in range(2):
                if not monitor.step_complete(f"Timing {step}", inner):
                    return None
            monitor.phase_finish(f"Timing {step}")
            monitor.step_complete("Building engine", step)
        monitor.phase_finish("Building engine")
        if network._flags != 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED.value or "gdn2_refuse" in network._file:
            self._logger.log(ILogger.ERROR, "Error Code 4: API Usage Error (stand-in)")
            return None
        plugins = network._layers.count(LayerType.PLUGIN_V3)
        known = config._cache._known.decode()
        _note(built=network._file, cleared=config._cleared, profiles=len(config._profiles), cache=known)
        plan = {"version": __version__, "file": network._file, "profiles": config._profiles, "plugins": plugins}
        return json.dumps(plan).encode()


class Runtime:
    def __init__(self, logger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine):
        try:
            plan = json.loads(bytes(serialized_engine))
        except ValueError:
            self._logger.log(ILogger.ERROR, "Error Code 1: Serialization (magicTag assertion failed)")
            return None
        if plan["plugins"] and get_plugin_registry().get_creator("GatedDeltaNet2", "1", "gdn2") is None:
            self._logger.log(ILogger.ERROR, "getPluginCreator could not find plugin GatedDeltaNet2 version 1")
            return None
        return ICudaEngine(plan)


_OF_ONNX = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int64)": "INT64"}
_NUMPY = {DataType.FLOAT: np.float32, DataType.HALF: np.float16, DataType.INT64: np.int64}


class ICudaEngine:
    def __init__(self, plan: dict) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._run = onnxruntime.InferenceSession(plan["file"], options, providers=["CPUExecutionProvider"]).run
        session = self._run.__self__
        self._inputs = {x.name: x for x in session.get_inputs()}
        self._tensors = self._inputs | {x.name: x for x in session.get_outputs()}
        self._profiles = plan["profiles"]
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._driver.standin_work.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64)
        self._driver.standin_capturing.argtypes = (ctypes.c_void_p,)
        self._driver.standin_inside.argtypes = (ctypes.c_uint64, ctypes.c_size_t)
        self.num_io_tensors, self.num_optimization_profiles = len(self._tensors), len(self._profiles)
        self.device_memory_size_v2 = _BLOCK

    def get_tensor_name(self, index):
        return list(self._tensors)[index]

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return DataType[_OF_ONNX[self._tensors[name].type]]

    def get_tensor_shape(self, name):
        return tuple(size if isinstance(size, int) else -1 for size in self._tensors[name].shape)

    def get_tensor_profile_shape(self, name, profile_index):
        return [tuple(shape) for shape in self._profiles[profile_index][name]]

    def create_execution_context(self, strategy):
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        return IExecutionContext(self)


_KEPT: list = []  # what streams will call


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine, self._profile, self._memory = engine, None, None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._settled: dict[str, tuple[int, ...]] | None = None  # the shapes that a run was enqueued with

    def set_optimization_profile_async(self, profile_index, stream_handle):
        self._profile, self._shapes = profile_index, {}
        return True

    def set_device_memory(self, memory, size) -> None:
        assert size >= _BLOCK and memory % 256 == 0
        self._memory = memory

    def set_input_shape(self, name, shape):
        least, _, most = self._engine.get_tensor_profile_shape(name, self._profile)
        if len(shape) != len(least) or not all(a <= x <= b for a, x, b in zip(least, shape, most)):
            return False
        self._shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name):
        """Of outputs: the batch and the tokens are those of input_ids."""
        if name in self._shapes:
            return self._shapes[name]
        axes = iter(self._shapes["input_ids"])
        return tuple(next(axes) if size < 0 else size for size in self._engine.get_tensor_shape(name))

    def set_tensor_address(self, name, memory):
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle):
        """As TensorRT: every shape and address is known, and the first run after another shape is not captured."""
        driver, engine = self._engine._driver, self._engine
        known = self._shapes.keys() == engine._inputs.keys() and self._addresses.keys() == engine._tensors.keys()
        capturing = driver.standin_capturing(stream_handle)
        if not known or self._memory is None or (capturing and self._settled != self._shapes):
            return False
        self._settled = dict(self._shapes)
        addresses, shapes = dict(self._addresses), {name: self.get_tensor_shape(name) for name in engine._tensors}
        memory = self._memory

        def work(_) -> int:
            if not driver.standin_inside(memory, _BLOCK):
                return 700
            views = {}
            for name, address in addresses.items():
                dtype = np.dtype(_NUMPY[engine.get_tensor_dtype(name)])
                size = int(np.prod(shapes[name])) * dtype.itemsize
                if not driver.standin_inside(address, size):
                    return 700
                views[name] = np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shapes[name])
            outputs = [name for name in engine._tensors if name not in engine._inputs]
            for name, value in zip(outputs, engine._run(outputs, {name: views[name] for name in engine._inputs})):
                views[name][...] = value
            return 0

        call = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64)(work)
        _KEPT.append(call)
        _note(ran=list(self._shapes["input_ids"]), captured=bool(capturing), profile=self._profile)
        return driver.standin_work(stream_handle, ctypes.cast(call, ctypes.c_void_p), 0) == 0
