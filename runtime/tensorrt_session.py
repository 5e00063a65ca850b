"""Plans of TensorRT on a GPU: any plan, and a language model as a backend of `gdn2_ops.runtime.generate`.

The language model keeps its states in the GPU's memory and decodes by CUDA graphs. Neither PyTorch nor the CUDA toolkit
is needed.
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gdn2_ops.runtime import tensorrt_library
from gdn2_ops.runtime.cuda_driver import Buffer, Driver, Graph, Stream
from gdn2_ops.runtime.runner import Port, check_language_model

_TYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "UINT8": "uint8",
}
_BYTES = {"bfloat16": 2}  # of a type that numpy does not know
_IN_PLACE = ".recurrent"  # states of this name go from a graph's input to our plugin and from there to its output


class TensorRT:
    """A `runtime.runner.Runner` of a plan: everything is copied to the GPU and back.

    Args:
        plan: of this version of TensorRT and of this kind of GPU.
        plugin: the library of `gdn2 build-plugin`; None is the one in the package, where it has been built.

    Raises: FileNotFoundError: no such file. ImportError: no tensorrt. RuntimeError: there is no GPU, or TensorRT
        refuses the plan, with what it said.
    """

    def __init__(self, plan: str | Path, *, plugin: str | Path | None = None) -> None:
        if not Path(plan).is_file():
            raise FileNotFoundError(f"expected a plan, got {str(plan)!r}; gdn2 export MODEL --to tensorrt writes one")
        trt = _tensorrt()
        self.driver = Driver()  # TensorRT without a driver returns objects that crash
        self._log = tensorrt_library.error_log(trt)
        found = tensorrt_library.built() if plugin is None else plugin
        if found is not None:  # a plan may need none; one that does says so
            tensorrt_library.load(trt, found, self._log)
        self._runtime = trt.Runtime(self._log)  # lives as long as the engine
        engine = self._runtime.deserialize_cuda_engine(Path(plan).read_bytes())
        if engine is None:
            raise RuntimeError(
                f"TensorRT {trt.__version__} refuses the plan {str(plan)!r}: {self._log.text()}; a plan is of one "
                "version and one kind of GPU, and needs the plugin it was built with: gdn2 build-plugin"
            )
        self.trt, self.engine, self.stream = trt, engine, Stream(self.driver)
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        is_input = {name: engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        self.inputs = [self._port(name) for name in names if is_input[name]]
        self.outputs = [self._port(name) for name in names if not is_input[name]]
        self._scratch = Buffer(self.driver, engine.device_memory_size_v2)  # of all contexts: they run one by one
        self._contexts: dict[int, Any] = {}

    def run(self, feed: dict[str, NDArray]) -> list[NDArray]:
        """Raises: ValueError: no profile of the plan has these shapes."""
        self.driver.use()
        arrays = {x.name: np.ascontiguousarray(feed[x.name], _dtype(x.dtype)) for x in self.inputs}
        profile = self.profile({name: x.shape for name, x in arrays.items()})
        if profile not in self._contexts:
            self._contexts[profile] = self.context(profile)
        context = self._contexts[profile]
        buffers = {name: Buffer(self.driver, x.nbytes) for name, x in arrays.items()}
        for name, array in arrays.items():
            self.stream.write(buffers[name], array)
            context.set_input_shape(name, array.shape)
        results = [np.empty(tuple(context.get_tensor_shape(x.name)), _dtype(x.dtype)) for x in self.outputs]
        buffers |= {x.name: Buffer(self.driver, y.nbytes) for x, y in zip(self.outputs, results)}
        self.bind(context, buffers)
        self.execute(context)
        for x, y in zip(self.outputs, results):
            self.stream.read(y, buffers[x.name])
        self.stream.synchronize()
        return results

    def profile(self, shapes: dict[str, tuple[int, ...]]) -> int:
        """The last profile that has these shapes. Raises: ValueError: none has."""
        for i in reversed(range(self.engine.num_optimization_profiles)):
            ranges = {name: self.engine.get_tensor_profile_shape(name, i) for name in shapes}
            if all(_within(shape, ranges[name]) for name, shape in shapes.items()):
                return i
        ranges = {name: self.engine.get_tensor_profile_shape(name, 0) for name in shapes}
        name = next((name for name in shapes if not _within(shapes[name], ranges[name])), next(iter(shapes)))
        least, _, most = map(tuple, ranges[name])
        raise ValueError(
            f"expected {name} of a shape from {least} to {most}, got {shapes[name]}; gdn2 export --to tensorrt has "
            "--batch and --tokens"
        )

    def context(self, profile: int) -> Any:
        """A context of its own for that profile. All share their memory, so only one may run at a time."""
        context = self.engine.create_execution_context(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None or not context.set_optimization_profile_async(profile, self.stream.handle):
            raise RuntimeError(f"TensorRT makes no context for profile {profile}: {self._log.text()}")
        context.set_device_memory(self._scratch.address, self._scratch.size)
        return context

    def bind(self, context: Any, buffers: dict[str, Buffer]) -> None:
        for name, buffer in buffers.items():
            context.set_tensor_address(name, buffer.address)

    def execute(self, context: Any) -> None:
        if not context.execute_async_v3(self.stream.handle):
            raise RuntimeError(f"TensorRT does not run the plan: {self._log.text()}")

    def _port(self, name: str) -> Port:
        dtype = self.engine.get_tensor_dtype(name).name
        shape = tuple(None if size < 0 else int(size) for size in self.engine.get_tensor_shape(name))
        return Port(name, _TYPES.get(dtype, dtype), shape)


class TensorRTBackend:
    """tokens [B, T] and a state to logits [B, T, vocab] and a state; the call overwrites the state that it is given.

    Each batch size has buffers of its own for a state before and a state after a call, which take turns, so that a
    decoding step copies none. What another state left there is put aside first.

    Args:
        plan, plugin: those of `TensorRT`.
        in_place: recurrent states before and after a call are one buffer: half the memory. Only for plans with our
            plugin; a function body needs both.
        graphs: decode by CUDA graphs.

    Raises: what `TensorRT` raises. ValueError: the plan is of no language model; tokens whose batch is too large.
    """

    def __init__(
        self, plan: str | Path, *, plugin: str | Path | None = None, in_place: bool = False, graphs: bool = True
    ) -> None:
        self._engine, self._in_place, self._graphs = TensorRT(plan, plugin=plugin), in_place, graphs
        self.inputs = self._engine.inputs
        check_language_model([x.name for x in self.inputs], [x.name for x in self._engine.outputs])
        self._lanes: dict[int, _Lane] = {}
        ranges = self._engine.engine.get_tensor_profile_shape("input_ids", 0)
        self._most_tokens = int(tuple(ranges[2])[1])

    def __call__(self, tokens: NDArray[np.int64], state: Any | None) -> tuple[NDArray[np.float32], Any]:
        self._engine.driver.use()
        batch = len(tokens)
        if state is not None and state.batch != batch:
            raise ValueError(f"expected tokens of the state's {state.batch} sequences, got {batch}")
        if batch not in self._lanes:
            self._lanes[batch] = _Lane(self._engine, batch, self._in_place, self._graphs)
        lane, state = self._lanes[batch], state or _State(batch)
        lane.take(state)
        most = self._most_tokens
        parts = [lane.run(tokens[:, begin : begin + most]) for begin in range(0, max(1, tokens.shape[1]), most)]
        return (parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)), state


class _State:
    """The states of `batch` sequences: in the lane that it owns, or put aside, or zeros before the first call."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.aside: list[Buffer] | None = None


class _Lane:
    """Everything with the shape of one batch size: two sets of states, and graphs from each to the other."""

    def __init__(self, engine: TensorRT, batch: int, in_place: bool, graphs: bool) -> None:
        self._engine, self._batch, self._with_graphs = engine, batch, graphs
        self._past, self._present = engine.inputs[1:], engine.outputs[1:]
        first = [Buffer(engine.driver, _bytes(x, batch)) for x in self._past]
        second = [
            buffer if in_place and x.name.endswith(_IN_PLACE) else Buffer(engine.driver, buffer.size)
            for x, buffer in zip(self._past, first)
        ]
        self._sets, self._at = (first, second), 0  # the set that holds the states now
        self._owner: weakref.ref[_State] | None = None
        self._step = np.empty((batch, 1, _sizes(engine.outputs[0])[-1]), _dtype(engine.outputs[0].dtype))
        self._token, self._logits = Buffer(engine.driver, batch * 8), Buffer(engine.driver, self._step.nbytes)
        self._steps: dict[int, Any] = {}  # a context for each set, in which a step has run
        self._captured: dict[int, Graph] = {}
        self._prompts: Any = None

    def take(self, state: _State) -> None:
        """Makes `state` the owner. The one before it is copied aside, if somebody still has it."""
        owner = None if self._owner is None else self._owner()
        if owner is state:
            return
        stream = self._engine.stream
        if owner is not None:
            owner.aside = [Buffer(self._engine.driver, x.size) for x in self._sets[self._at]]
            for to, source in zip(owner.aside, self._sets[self._at]):
                stream.copy(to, source)
        for i, buffer in enumerate(self._sets[self._at]):
            if state.aside is None:
                stream.clear(buffer)
            else:
                stream.copy(buffer, state.aside[i])
        stream.synchronize()  # then what was aside may be freed
        state.aside, self._owner = None, weakref.ref(state)

    def run(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Moves the owner's states on by tokens [batch, T]; logits [batch, T, vocab]."""
        tokens = np.ascontiguousarray(tokens, np.int64)
        logits = self._decode(tokens) if tokens.shape[1] == 1 else self._read(tokens)
        self._at = 1 - self._at
        return logits.astype(np.float32, copy=False)

    def _read(self, tokens: NDArray[np.int64]) -> NDArray:
        engine = self._engine
        shapes = self._shapes(tokens.shape)
        if self._prompts is None:
            self._prompts = engine.context(engine.profile(shapes))
        logits = np.empty((*tokens.shape, self._step.shape[-1]), self._step.dtype)
        buffers = Buffer(engine.driver, tokens.nbytes), Buffer(engine.driver, logits.nbytes)
        engine.stream.write(buffers[0], tokens)
        self._prepare(self._prompts, shapes, *buffers)
        engine.execute(self._prompts)
        engine.stream.read(logits, buffers[1])
        engine.stream.synchronize()
        return logits

    def _decode(self, tokens: NDArray[np.int64]) -> NDArray:
        """From each set the first step runs as it is, which TensorRT needs before the second can be captured."""
        engine, at = self._engine, self._at
        engine.stream.write(self._token, tokens)
        if at in self._captured:
            engine.stream.launch(self._captured[at])
        elif at in self._steps:
            context = self._steps[at]
            if self._with_graphs:
                self._captured[at] = engine.stream.capture(lambda: engine.execute(context))
                engine.stream.launch(self._captured[at])
            else:
                engine.execute(context)
        else:
            shapes = self._shapes(tokens.shape)
            context = engine.context(engine.profile(shapes))
            self._prepare(context, shapes, self._token, self._logits)
            engine.execute(context)
            self._steps[at] = context
        engine.stream.read(self._step, self._logits)
        engine.stream.synchronize()
        return self._step.copy()

    def _shapes(self, tokens: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {"input_ids": tokens} | {x.name: (self._batch, *_sizes(x)[1:]) for x in self._past}

    def _prepare(self, context: Any, shapes: dict[str, tuple[int, ...]], tokens: Buffer, logits: Buffer) -> None:
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise ValueError(f"expected {name} of a shape that the plan was built for, got {shape}")
        before, after = self._sets[self._at], self._sets[1 - self._at]
        states = {x.name: buffer for x, buffer in zip((*self._past, *self._present), (*before, *after))}
        self._engine.bind(context, {"input_ids": tokens, "logits": logits} | states)


def _tensorrt() -> Any:
    try:
        import tensorrt
    except ImportError:
        try:
            import tensorrt_lean as tensorrt  # for plans of trtexec --versionCompatible
        except ImportError as error:
            raise ImportError(
                "gdn2_ops.runtime.tensorrt_session needs tensorrt: pip install tensorrt-cu13 (or tensorrt-cu12)"
            ) from error
    return tensorrt


def _within(shape: tuple[int, ...], ranges: Any) -> bool:
    least, _, most = ranges
    return len(shape) == len(tuple(least)) and all(a <= x <= b for a, x, b in zip(least, shape, most))


def _dtype(name: str) -> np.dtype:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def _bytes(port: Port, batch: int) -> int:
    return batch * int(np.prod(_sizes(port)[1:])) * (_BYTES.get(port.dtype) or np.dtype(port.dtype).itemsize)


def _sizes(port: Port) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else -1 for size in port.shape)
