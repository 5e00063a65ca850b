"""What is wrong with a model repository before a server sees it: each trap here loads in silence and fails later.

    problems("repository")      one line for each: the model, what is wrong, the way out

Measured on Triton Inference Server 24.10, or read in its sources of 2026; docs/deploy.md has the versions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx

try:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2 as schema
except ImportError as error:
    raise ImportError(f"gdn2 check of a repository needs {error.name}: pip install 'gdn2-ops[server]'") from error

READABLE_IR, READABLE_OPSET = 10, 21  # of ONNX Runtime 1.20, in the servers from 24.12 on
Rule = Callable[[Any, Path], Iterator[str]]


def problems(repository: str | Path) -> list[str]:
    """One line for each problem of each model; empty when there is none.

    Raises: FileNotFoundError: the folder has no model.
    """
    folders = sorted(path.parent for path in Path(repository).glob("*/config.pbtxt"))
    if not folders:
        raise FileNotFoundError(f"expected a folder of models with config.pbtxt, got {str(repository)!r} without one")
    return [f"{folder.name}: {text}" for folder in folders for text in _problems(folder)]


def _problems(folder: Path) -> Iterator[str]:
    config = schema.ModelConfig()
    try:
        text_format.Parse((folder / "config.pbtxt").read_text(), config)
    except text_format.ParseError as error:
        yield f"config.pbtxt cannot be read: {error}"
        return
    for rule in RULES:
        yield from rule(config, folder)


def _files(config: Any, folder: Path) -> Iterator[str]:
    if config.name != folder.name:
        yield f"expected the name of its folder, got {config.name!r}"
    versions = _versions(folder)
    if not versions:
        yield "expected a version folder like 1, got none"
    for version in versions:
        file = version / _file(config)
        planned = file.suffix == ".plan" and (version / "model.onnx").is_file()  # built where it runs
        if not file.is_file() and not planned:
            yield f"expected {version.name}/{file.name}, got no such file"


def _kind(config: Any, folder: Path) -> Iterator[str]:
    if not config.backend and not config.platform:
        yield "expected a backend or a platform, got neither"
    if config.platform == "torch_aoti" and (config.HasField("sequence_batching") or config.max_batch_size > 1):
        yield "torch_aoti has no batches and no sequences: set max_batch_size to 0 and drop sequence_batching"
    if config.platform == "torch_aoti":
        for kind, tensors in (("INPUT", config.input), ("OUTPUT", config.output)):
            if [x.name for x in tensors] != [f"{kind}__{i}" for i in range(len(tensors))]:
                yield f"torch_aoti knows tensors as {kind}__0, {kind}__1, ..., got {[x.name for x in tensors]}"


def _states(config: Any, folder: Path) -> Iterator[str]:
    states = list(config.sequence_batching.state)
    if not states:
        return
    if config.backend == "python" or not (config.backend or config.platform):
        yield "the python backend takes a state block and ignores it: the state is always the initial one"
    pairs = [(x.input_name, x.output_name) for x in states]
    if sorted(pairs) != [(x, y) for x, y in zip(sorted(x for x, _ in pairs), sorted(y for _, y in pairs))]:
        yield "inputs and outputs of states sort differently by name, and the server pairs them in that order: swapped"
    listed = sorted({x.name for x in config.output} & {y for _, y in pairs})
    if listed and config.max_batch_size > 1:
        yield f"states {listed} are outputs too: every batch above 1 fails; give out a copy under another name"
    for state in states:
        if not state.initial_state:
            yield f"{state.input_name} has no initial_state: the first step reads whatever is there"
        elif not all(x.zero_data for x in state.initial_state):
            yield f"{state.input_name}: expected initial_state with zero_data, for a sequence begins with zeros"
        if state.use_growable_memory:
            yield f"{state.input_name}: use_growable_memory is for states that grow; this one would go missing"
        if not state.dims:
            yield f"{state.input_name} has no dims: the server keeps no state without dimensions"


def _sequences(config: Any, folder: Path) -> Iterator[str]:
    if not config.HasField("sequence_batching"):
        return
    batching = config.sequence_batching
    if batching.WhichOneof("strategy_choice") != "oldest":
        yield "expected the strategy oldest: with direct, empty slots carry memory that nobody wrote"
    if not batching.max_sequence_idle_microseconds:
        yield "no max_sequence_idle_microseconds: a sequence is lost after one second without a request"
    if batching.iterative_sequence:
        yield "iterative_sequence counts each finished generation as cancelled, leaks before 25.11: decouple instead"
    if batching.oldest.max_queue_delay_microseconds or batching.direct.max_queue_delay_microseconds:
        yield "expected max_queue_delay_microseconds of 0: a delay costs every token and fills no batch"
    slots = int(config.parameters["slots"].string_value or 0) if "slots" in config.parameters else None
    candidates = batching.oldest.max_candidate_sequences
    if config.backend == "python" and (slots is None or slots < 2 * candidates):
        yield (
            f"expected a parameter slots of at least twice max_candidate_sequences = {candidates}, got {slots}: "
            "the model never hears of sequences that time out"
        )
    if config.response_cache.enable:
        yield "a response cache with sequences: one request has many answers; the server refuses it"
    if config.model_warmup:
        yield "a warm-up with sequences: it arrives without a sequence id and without START"


def _batching(config: Any, folder: Path) -> Iterator[str]:
    if config.response_cache.enable and config.model_transaction_policy.decoupled:
        yield "a response cache of a decoupled model: the server refuses it"
    if config.HasField("dynamic_batching") and config.model_transaction_policy.decoupled and config.max_batch_size:
        yield "a decoupled model schedules its own batches: set max_batch_size to 0 and drop dynamic_batching"


def _libraries(config: Any, folder: Path) -> Iterator[str]:
    for name in config.model_operations.op_library_filename:
        if not name.startswith("/"):
            yield f"op_library_filename {name!r} is not absolute: it is looked for in the system's folders only"
        elif Path(name).is_relative_to(folder.parent.resolve()) and not Path(name).is_file():
            yield f"expected the library {name}, got no such file"


def _graphs(config: Any, folder: Path) -> Iterator[str]:
    cuda = config.optimization.cuda
    if not cuda.graphs:
        return
    if config.HasField("sequence_batching") and not config.sequence_batching.oldest.preferred_batch_size:
        yield "CUDA graphs are captured for preferred_batch_size of oldest, got none: most batches have no graph"
    if any(spec.HasField("graph_lower_bound") for spec in cuda.graph_spec):
        yield "graph_lower_bound runs a graph of another size, on rows that nobody wrote"


def _onnx(config: Any, folder: Path) -> Iterator[str]:
    """The configuration against the file; a plan has the names and sizes of the file it was built from."""
    native = config.backend == "onnxruntime" or config.platform == "tensorrt_plan"
    for version in _versions(folder) if native else []:
        if not (version / "model.onnx").is_file():
            continue
        model = onnx.load(version / "model.onnx", load_external_data=False)
        opset = next((x.version for x in model.opset_import if x.domain in ("", "ai.onnx")), 0)
        if model.ir_version > READABLE_IR or opset > READABLE_OPSET:
            yield f"expected IR <= {READABLE_IR} and opset <= {READABLE_OPSET}, got {model.ir_version} and {opset}"
        states = config.sequence_batching.state
        inputs = {x.name: (x.data_type, list(x.dims), x.HasField("reshape")) for x in config.input}
        inputs |= {x.input_name: (x.data_type, list(x.dims), False) for x in states}
        outputs = {x.name: (x.data_type, list(x.dims), x.HasField("reshape")) for x in config.output}
        outputs |= {x.output_name: (x.data_type, list(x.dims), False) for x in states}
        for what, configured, tensors in (
            ("inputs", inputs, model.graph.input),
            ("outputs", outputs, model.graph.output),
        ):
            in_file = {x.name: _shape(x) for x in tensors}
            if configured.keys() != in_file.keys():
                yield f"expected the {what} of model.onnx, got others: {sorted(configured.keys() ^ in_file.keys())}"
            for name in sorted(configured.keys() & in_file.keys()):
                type, dims, reshaped = configured[name]
                want = in_file[name][0], in_file[name][1] or ([1] if reshaped else [])
                if (type, dims) != want:
                    yield f"expected {name} of type and dims {want} as in model.onnx, got {(type, dims)}"


RULES: tuple[Rule, ...] = (_files, _kind, _states, _sequences, _batching, _libraries, _graphs, _onnx)


def _versions(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name.isdecimal())


def _file(config: Any) -> str:
    names = {"python": "model.py", "onnxruntime": "model.onnx", "pytorch": "model.pt"}
    platforms = {"tensorrt_plan": "model.plan", "torch_aoti": "model.pt2"}
    return config.default_model_filename or platforms.get(config.platform) or names.get(config.backend, "model.py")


def _shape(x: Any) -> tuple[int, list[int]]:
    """The server's number of the type, and the dims behind the batch."""
    types = {onnx.TensorProto.FLOAT: "FP32", onnx.TensorProto.FLOAT16: "FP16", onnx.TensorProto.INT64: "INT64"}
    kind = getattr(schema, f"TYPE_{types.get(x.type.tensor_type.elem_type, 'INVALID')}")
    return kind, [dim.dim_value or -1 for dim in list(x.type.tensor_type.shape.dim)[1:]]
