"""What each command of `gdn2` does: the parsed options in, the exit status out. `cli` says what the options are."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

PARTS = {
    "onnx": ("onnx", "onnx_ir", "onnxscript", "onnxruntime"),
    "genai": ("onnxruntime_genai",),
    "triton": ("triton",),
    "tensorrt": ("triton", "cmake"),
    "server": ("tritonclient",),
    "transformers": ("transformers",),
}


def info(options: argparse.Namespace) -> int:
    import torch

    from gdn2_ops.custom_ops.contract import SCHEMAS

    print(f"gdn2-ops {importlib.metadata.version('gdn2-ops')}, Python {platform.python_version()}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, CUDA {torch.cuda.is_available()}")
    for part, packages in PARTS.items():
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        state = f"missing {', '.join(missing)}: pip install 'gdn2-ops[{part}]'" if missing else "installed"
        print(f"{part}: {state}")
    print("operators: " + ", ".join(f"gdn2::{name}" for name in SCHEMAS))
    return 0


def demo(options: argparse.Namespace) -> int:
    from gdn2_ops import demo

    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        return demo.run(options.model, options.output, options.server)
    with tempfile.TemporaryDirectory() as folder:
        return demo.run(options.model, Path(folder) / "model.onnx", options.server)


def export(options: argparse.Namespace) -> int:
    from gdn2_ops.model import GDN2LM

    if options.to != "genai" and (options.library or options.tokenizer):
        raise ValueError(f"expected --library and --tokenizer with --to genai, got --to {options.to}")
    if options.to not in ("onnx", "tensorrt") and options.dtype:
        raise ValueError(f"expected --dtype with --to onnx or tensorrt, got --to {options.to}")
    if options.to != "onnx" and (options.quantize or options.opset):
        raise ValueError(f"expected --quantize and --opset with --to onnx, got --to {options.to}")
    of_plans = (options.batch, options.tokens, options.plugin, options.timing_cache, options.dry_run or None)
    if options.to != "tensorrt" and any(x is not None for x in of_plans):
        raise ValueError(
            "expected --batch, --tokens, --plugin, --timing-cache and --dry-run with --to tensorrt, "
            f"got --to {options.to}"
        )
    of_repositories = (options.backend, options.slots, options.threads, options.server_library)
    if options.to != "triton-repository" and any(x is not None for x in of_repositories):
        raise ValueError(
            "expected --backend, --slots, --threads and --server-library with --to triton-repository, "
            f"got --to {options.to}"
        )
    if options.to == "triton-repository":
        return _export_repository(options)
    if not options.output.parent.is_dir():
        raise FileNotFoundError(f"expected an existing folder to write to, got {str(options.output.parent)!r}")
    model = GDN2LM.from_pretrained(options.model)
    if options.to == "tensorrt":
        return _export_plan(model, options)
    if options.to == "genai":
        from gdn2_ops.export import genai

        folder = genai.export(
            model, options.output, body=options.body, library=options.library, tokenizer=options.tokenizer
        )
        print(f"wrote {folder}: " + ", ".join(sorted(file.name for file in folder.iterdir())))
        return 0
    if options.to == "aoti":
        from gdn2_ops.export import aoti

        file = aoti.export(model, options.output)
    else:
        file = _export_onnx(model, options)
    print(f"wrote {file} ({file.stat().st_size:,} bytes)")
    return 0


def _export_onnx(model, options: argparse.Namespace) -> Path:
    from gdn2_ops.export.onnx import OPSET, export
    from gdn2_ops.export.onnx_quantize import quantize_int8

    write = partial(export, model, body=options.body, opset=options.opset or OPSET, dtype=_dtype(options))
    if options.quantize is None:
        return write(options.output)
    with tempfile.TemporaryDirectory() as folder:
        return quantize_int8(write(Path(folder) / "model.onnx"), options.output)


def _dtype(options: argparse.Namespace):
    import torch

    return None if options.dtype is None else getattr(torch, options.dtype)


def _export_plan(model, options: argparse.Namespace) -> int:
    from gdn2_ops.export import tensorrt
    from gdn2_ops.export.tensorrt_commands import Sizes

    given = {"batch": options.batch, "tokens": options.tokens}
    sizes = Sizes(**{name: value for name, value in given.items() if value is not None})
    of_file = {"body": options.body, "dtype": _dtype(options)}
    of_build = {"plugin": options.plugin, "timing_cache": options.timing_cache}
    if options.dry_run:
        print("\n\n".join(tensorrt.dry_run(model, options.output, sizes, **of_file, **of_build)))
        return 0
    try:
        built = tensorrt.export(model, options.output, sizes, **of_file, **of_build, report=tensorrt.progress_bar())
    except RuntimeError as error:  # there is no GPU, or TensorRT refuses
        print(f"gdn2: error: {error}", file=sys.stderr)
        return 1
    print(
        f"wrote {options.output} ({built.size:,} bytes): TensorRT {built.version}, {built.layers} layers, "
        f"{built.plugins} of them plugins, {built.seconds:.0f} s"
    )
    return 0


def convert(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from gdn2_ops.checkpoints import load_published
    from gdn2_ops.model import PRESETS, GDN2Config

    config = PRESETS[options.config] if options.config in PRESETS else GDN2Config.load(options.config)
    if options.output_gate is not None:
        config = replace(config, output_gate=options.output_gate)
    load_published(options.checkpoint, config).save_pretrained(options.output)
    print(f"wrote {options.output}")
    return 0


def _export_repository(options: argparse.Namespace) -> int:
    from gdn2_ops.export.model_repository import Serving, server_flags, write_repository
    from gdn2_ops.model import GDN2LM

    given = {"slots": options.slots, "threads": options.threads, "library": options.server_library}
    serving = Serving(**{name: value for name, value in given.items() if value is not None})
    backend = options.backend or "python"
    folder = write_repository(
        GDN2LM.from_pretrained(options.model), options.output, backend, serving, body=options.body
    )
    print(f"wrote {folder}; serve it with\n{server_flags(folder, backend)}")
    return 0


def build_kernels(options: argparse.Namespace) -> int:
    from gdn2_ops.export import kernels

    builds = kernels.plan(**_selection(options), **({"kernels": options.kernel} if options.kernel else {}))
    print(f"wrote {kernels.build_kernels(options.output, builds, jobs=options.jobs, report=_report_cubins)}")
    return 0


def build_plugin(options: argparse.Namespace) -> int:
    from gdn2_ops.compiled import library_folder
    from gdn2_ops.export import cubins, plugin

    builds = cubins.embedded(**_selection(options))
    build = partial(plugin.build, builds=builds, target=options.target, jobs=options.jobs, report=_report_cubins)
    if options.output is not None:
        file = build(options.output)
    else:
        with tempfile.TemporaryDirectory() as folder:
            built = build(folder)
            file = Path(shutil.copy(built, library_folder()))
    print(f"wrote {file} ({file.stat().st_size:,} bytes)")
    return 0


def _selection(options: argparse.Namespace) -> dict:
    selection = {"archs": options.arch, "dtypes": options.dtype}
    if options.head_size is not None:
        selection["head_sizes"] = [_head_size(text) for text in options.head_size]
    return {name: value for name, value in selection.items() if value is not None}


def _report_cubins(done: int, of: int) -> None:
    if done % 50 == 0 or done == of:
        print(f"{done} of {of} cubins", flush=True)


def _head_size(text: str) -> tuple[int, int]:
    K, _, V = text.partition("x")
    if not K.isdecimal() or not (V or K).isdecimal():
        raise ValueError(f"expected --head-size like 128 or 128x256, got {text!r}")
    return int(K), int(V or K)


def check(options: argparse.Namespace) -> int:
    if options.file.is_dir():
        from gdn2_ops.export.repository_check import problems

        found = problems(options.file)
        print("\n".join(found) if found else f"{options.file}: no problems")
        return 1 if found else 0
    if options.file.suffix == ".plan":
        return _check_plan(options)
    if options.plugin is not None or options.in_place:
        raise ValueError(f"expected a plan with --plugin and --in-place, got {str(options.file)!r}")
    import gdn2_ops.export.onnx  # noqa: F401  its error names the pip command
    from gdn2_ops import check

    return check.run(options.file, model_folder=options.model, bodies=options.body)


def _check_plan(options: argparse.Namespace) -> int:
    if options.model is None:
        raise ValueError("expected --model with a plan, the folder it was exported from, got none")
    try:
        from gdn2_ops import check_plan

        return check_plan.run(options.file, options.model, plugin=options.plugin, in_place=options.in_place)
    except RuntimeError as error:  # there is no GPU, or TensorRT refuses
        print(f"gdn2: error: {error}", file=sys.stderr)
        return 1


def generate(options: argparse.Namespace) -> int:
    from gdn2_ops.runtime.generate import generate

    try:
        backend = _backend(options.model, options.library, options.cuda)
    except RuntimeError as error:  # there is no GPU, or TensorRT refuses
        if options.model.suffix != ".plan" and not options.cuda:
            raise
        print(f"gdn2: error: {error}", file=sys.stderr)
        return 1
    prompt = sys.stdin.buffer.read() if options.prompt is None else options.prompt.encode()
    for byte in generate(backend, prompt, options.count):
        sys.stdout.buffer.write(byte)
        sys.stdout.buffer.flush()
    print()
    return 0


def serve(options: argparse.Namespace) -> int:
    from gdn2_ops.runtime.server import Server

    ports = [int(port) for port in options.ports.split(",")]
    if len(ports) != 3:
        raise ValueError(f"expected three --ports like 8000,8001,8002, got {options.ports!r}")
    try:
        server = Server(options.repository, options.env, ports=ports, log=options.log)
        print(
            f"ready after {server.ready_seconds:.1f} s: HTTP {server.http}, gRPC {server.grpc}, "
            f"metrics http://{server.metrics}/metrics, log {server.log}",
            flush=True,
        )
        with server:
            status = server.watch(options.canary_seconds)
    except RuntimeError as error:
        print(f"gdn2: error: {error}", file=sys.stderr)
        return 1
    print("drained" if status == 0 else f"the server ended with status {status}; see {server.log}", flush=True)
    return int(status != 0)


def client(options: argparse.Namespace) -> int:
    from gdn2_ops.runtime.client import Client, ServerError, generate_by_grpc

    try:
        client = Client(options.http, name=options.name)
        if options.canary:
            print(f"answered: {', '.join(client.canary())}")
            return 0
        prompt = sys.stdin.buffer.read() if options.prompt is None else options.prompt.encode()
        limit = {} if options.seconds is None else {"seconds": options.seconds}
        if options.grpc is not None:
            parts = generate_by_grpc(options.grpc, prompt, options.count, name=options.name, **limit)
        else:
            parts = client.generate(prompt, options.count, **limit)
        for part in parts:
            sys.stdout.buffer.write(part)
            sys.stdout.buffer.flush()
        print()
    except (ServerError, OSError) as error:
        print(f"gdn2: error: {error}", file=sys.stderr)
        return 1
    return 0


def _backend(model: Path, library: bool, cuda: bool):
    if model.suffix == ".onnx":
        from gdn2_ops.runtime.session import OnnxRuntimeBackend

        return OnnxRuntimeBackend(model, library=library, cuda=cuda)
    if library or cuda:
        raise ValueError(f"expected an .onnx file with --library or --cuda, got {str(model)!r}; gdn2 export writes one")
    if model.suffix == ".plan":
        from gdn2_ops.runtime.tensorrt_session import TensorRTBackend

        return TensorRTBackend(model)
    from gdn2_ops.backends import PackageBackend, TorchBackend
    from gdn2_ops.model import GDN2LM

    if model.suffix == ".pt2":
        return PackageBackend(model)
    return TorchBackend(GDN2LM.from_pretrained(model))
