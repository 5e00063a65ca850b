"""An engine of TensorRT from an exported ONNX file, built on the GPU that it will run on.

Where TensorRT is not installed, `export.tensorrt_commands` spells the same build for trtexec and polygraphy.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gdn2_ops.compiled import library_folder
from gdn2_ops.export import onnx
from gdn2_ops.export.onnx_bodies import NONE
from gdn2_ops.export.tensorrt_commands import Profile, Sizes, polygraphy, polygraphy_compare, read_inputs, trtexec
from gdn2_ops.runtime import tensorrt_library
from gdn2_ops.runtime.cuda_driver import Driver

Report = Callable[[str, float], None]  # what is being done, and how much of all of it is done, 0 to 1


@dataclass(frozen=True)
class Built:
    """What was built: TensorRT's version, layers of the network, how many of them are plugins, bytes of the plan,
    seconds."""

    version: str
    layers: int
    plugins: int
    size: int
    seconds: float


def export(
    model: nn.Module,
    plan: str | Path,
    sizes: Sizes | None = None,
    *,
    body: str = "chunk",
    dtype: torch.dtype | None = None,
    plugin: str | Path | None = None,
    timing_cache: str | Path | None = None,
    report: Report | None = None,
) -> Built:
    """A language model as a plan, and as the ONNX file of the same name that the plan is built from.

    Args:
        model, body, dtype: those of `export.onnx.export`.
        sizes: the most that one call is to hold.
        plugin: the library; None is the one of `gdn2 build-plugin`, "" builds the nodes' function bodies.
        plan, timing_cache, report: those of `build`.

    Raises: what `export.onnx.export` and `build` raise. ImportError: there is no plugin.
    """
    library = None if plugin == "" else Path(plugin or tensorrt_library.path())
    if library is not None and not library.is_file():
        raise FileNotFoundError(f"expected a plugin library, got {str(library)!r}; gdn2 build-plugin writes one")
    _tensorrt()  # these two before the export, which takes seconds
    Driver()
    file, profiles = _write_onnx(model, plan, sizes, body, dtype)
    return build(file, plan, profiles, plugin=library, timing_cache=timing_cache, report=report)


def dry_run(
    model: nn.Module,
    plan: str | Path,
    sizes: Sizes | None = None,
    *,
    body: str = "chunk",
    dtype: torch.dtype | None = None,
    plugin: str | Path | None = None,
    timing_cache: str | Path | None = None,
) -> list[str]:
    """As `export`, but writes the ONNX file alone. Returns the lines that build the plan with trtexec and with
    polygraphy, and one by which polygraphy compares an engine with the function bodies in ONNX Runtime."""
    library = None if plugin == "" else Path(plugin or library_folder() / tensorrt_library.LIBRARY)
    file, profiles = _write_onnx(model, plan, sizes, body, dtype)
    lines = [write(file, plan, profiles, plugin=library, timing_cache=timing_cache) for write in (trtexec, polygraphy)]
    return [*lines, *([] if body == NONE else [polygraphy_compare(file, profiles, plugin=library)])]


def _write_onnx(
    model: nn.Module, plan: str | Path, sizes: Sizes | None, body: str, dtype: torch.dtype | None
) -> tuple[Path, list[Profile]]:
    if Path(plan).suffix == ".onnx":
        raise ValueError(
            f"expected a plan's name like model.plan, got {str(plan)!r}, the name of the ONNX file beside it"
        )
    file = onnx.export(model, Path(plan).with_suffix(".onnx"), body=body, dtype=dtype)
    return file, (sizes or Sizes()).profiles(read_inputs(file))


def build(
    file: str | Path,
    plan: str | Path,
    profiles: Sequence[Profile],
    *,
    plugin: str | Path | None,
    timing_cache: str | Path | None = None,
    report: Report | None = None,
) -> Built:
    """Writes a plan: strongly typed, TF32 off, one engine for all profiles.

    Args:
        file: an ONNX file with its weights in it or beside it.
        plan: the file to write.
        profiles: of `export.tensorrt_commands.Sizes`.
        plugin: the library of `gdn2 build-plugin`; None builds the nodes' function bodies.
        timing_cache: a file of measured times, read where it exists and written: the next build is faster.
        report: called as the build goes on.

    Raises: ImportError: no tensorrt. RuntimeError: there is no GPU, or TensorRT refuses the plugin, the file or the
        build, with what it said. KeyboardInterrupt: the build was cancelled; nothing is written.
    """
    trt = _tensorrt()
    Driver()  # TensorRT without a driver returns objects that crash
    began, log = time.perf_counter(), tensorrt_library.error_log(trt)
    if plugin is not None:
        tensorrt_library.load(trt, plugin, log)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(file)):
        errors = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise RuntimeError(f"TensorRT's parser refuses {str(file)!r}: {errors or log.text()}")
    kinds = [network.get_layer(i).type for i in range(network.num_layers)]
    plugins = kinds.count(trt.LayerType.PLUGIN_V3) if plugin is not None else 0
    if plugin is not None and not plugins:
        raise RuntimeError(f"expected nodes that become plugins in {str(file)!r}, got none")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    monitor = _monitor(trt, report or (lambda what, part: None))
    config.progress_monitor = monitor
    _add_profiles(builder, network, config, profiles)
    cache = _open_cache(config, timing_cache)
    serialized = builder.build_serialized_network(network, config)
    if monitor.cancelled:
        raise KeyboardInterrupt
    if serialized is None:
        raise RuntimeError(f"TensorRT builds no engine of {str(file)!r}: {log.text()}")
    size = Path(plan).write_bytes(serialized)
    if timing_cache is not None:
        Path(timing_cache).write_bytes(cache.serialize())
    return Built(trt.__version__, len(kinds), plugins, size, time.perf_counter() - began)


def progress_bar(width: int = 30) -> Report:
    """A report to standard error: one line that is written over in a terminal, else a line for every tenth."""
    tenths = -1

    def report(what: str, part: float) -> None:
        nonlocal tenths
        if sys.stderr.isatty():
            filled = int(part * width)
            end = "\n" if part >= 1 else ""
            text = f"\r[{'#' * filled}{'.' * (width - filled)}] {part:4.0%} {what[:60]:<60}"
            print(text, end=end, file=sys.stderr, flush=True)
        elif int(part * 10) > tenths:
            tenths = int(part * 10)
            print(f"{part:4.0%} {what}", file=sys.stderr, flush=True)

    return report


def _tensorrt() -> Any:
    try:
        import tensorrt
    except ImportError as error:
        raise ImportError(
            "gdn2_ops.export.tensorrt needs tensorrt and a GPU: pip install tensorrt-cu13 (or tensorrt-cu12); "
            "with --dry-run it prints the lines for trtexec and polygraphy instead"
        ) from error
    return tensorrt


def _add_profiles(builder: Any, network: Any, config: Any, profiles: Sequence[Profile]) -> None:
    names = [network.get_input(i).name for i in range(network.num_inputs)]
    for wanted in profiles:
        if sorted(wanted) != sorted(names):
            raise ValueError(f"expected profiles of the inputs {names}, got {list(wanted)}")
        profile = builder.create_optimization_profile()
        for name in names:
            profile.set_shape(name, *wanted[name])
        if config.add_optimization_profile(profile) < 0:
            raise RuntimeError(f"TensorRT refuses the profile {wanted}")


def _open_cache(config: Any, file: str | Path | None) -> Any:
    """The cache of a file, or an empty one. One of another TensorRT or GPU is refused by TensorRT: it is left out."""
    known = Path(file).read_bytes() if file is not None and Path(file).is_file() else b""
    cache = config.create_timing_cache(known)
    if not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _monitor(trt: Any, report: Report) -> Any:
    class Monitor(trt.IProgressMonitor):
        """TensorRT's phases, which lie inside of each other, as parts of one. An interrupt cancels the build."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, list] = {}  # name: [parent, steps, done]
            self.part = 0.0  # never less than before: a phase that has finished is not yet a step of its parent
            self.cancelled = False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases[phase_name] = [parent_phase, max(num_steps, 1), 0]
            self._say(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.phases:
                self.phases[phase_name][2] = step + 1
                self._say(phase_name)
            return not self.cancelled

        def phase_finish(self, phase_name: str) -> None:
            parent = self.phases.pop(phase_name, [None])[0]
            if parent not in self.phases:
                self._tell(phase_name, 1.0)

        def _say(self, phase_name: str) -> None:
            path, part = [phase_name], 0.0
            while True:
                parent, steps, done = self.phases[path[0]]
                part = min((done + part) / steps, 0.999)
                if parent not in self.phases:
                    break
                path.insert(0, parent)
            self.part = max(self.part, part)
            self._tell(": ".join(path[:2]), self.part)

        def _tell(self, what: str, part: float) -> None:
            try:
                report(what, part)
            except KeyboardInterrupt:  # it must not pass through TensorRT
                self.cancelled = True

    return Monitor()
