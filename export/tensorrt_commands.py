"""The shapes that TensorRT builds an exported language model for, and the command lines that build it.

A profile is a range of shapes that kernels are chosen for. An engine has two: PREFILL for parts of prompts, of any
length, and DECODE for single tokens of many sequences.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gdn2_ops.export.program import BATCH, SEQUENCE

Shape = tuple[int, ...]
Axes = tuple[int | str, ...]
Profile = dict[str, tuple[Shape, Shape, Shape]]  # input: the least, the usual and the largest shape
PREFILL, DECODE = 0, 1
TRTEXEC_FLAGS = ("--stronglyTyped", "--noTF32", "--skipInference")


@dataclass(frozen=True)
class Sizes:
    """The largest numbers of sequences, and of tokens of each, in one call; both at least 1."""

    batch: int = 8
    tokens: int = 1024

    def __post_init__(self) -> None:
        if self.batch < 1 or self.tokens < 1:
            raise ValueError(f"expected at least one sequence and one token, got {self.batch} and {self.tokens}")

    def profiles(self, inputs: Mapping[str, Axes]) -> list[Profile]:
        """PREFILL and DECODE for inputs whose shapes are sizes and names of dimensions.

        Raises: ValueError: a dimension that is neither the batch nor the sequence.
        """
        for name, axes in inputs.items():
            unknown = [axis for axis in axes if isinstance(axis, str) and axis not in (BATCH, SEQUENCE)]
            if unknown:
                raise ValueError(
                    f"expected dimensions named {BATCH!r} and {SEQUENCE!r}, got {unknown} of {name!r}; "
                    "gdn2_ops.export.onnx names those of language models"
                )
        B, T = self.batch, self.tokens
        ranges = {PREFILL: ((1, 1), (1, T), (B, T)), DECODE: ((1, 1), (B, 1), (B, 1))}
        return [
            {name: _shapes(axes, ranges[profile]) for name, axes in inputs.items()} for profile in (PREFILL, DECODE)
        ]


def _shapes(axes: Axes, sizes: tuple[tuple[int, int], ...]) -> tuple[Shape, Shape, Shape]:
    least, usual, largest = (
        tuple(axis if isinstance(axis, int) else B if axis == BATCH else T for axis in axes) for B, T in sizes
    )
    return least, usual, largest


def read_inputs(file: str | Path) -> dict[str, Axes]:
    """The inputs of an ONNX file and their shapes, names where they are dynamic.

    Raises: FileNotFoundError: no such file. ImportError: no onnx.
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError("gdn2_ops.export.tensorrt needs onnx: pip install 'gdn2-ops[onnx]'") from error
    if not Path(file).is_file():
        raise FileNotFoundError(f"expected an ONNX file, got {str(file)!r}; gdn2 export MODEL --to onnx writes one")
    graph = onnx.load(file, load_external_data=False).graph
    return {x.name: tuple(d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim) for x in graph.input}


def trtexec(
    file: str | Path,
    plan: str | Path,
    profiles: Sequence[Profile],
    *,
    plugin: str | Path | None,
    timing_cache: str | Path | None = None,
) -> str:
    """The line that builds `plan` of `file` with trtexec, which reads a profile's shapes right after its number."""
    words = ["trtexec", f"--onnx={file}", f"--saveEngine={plan}", *TRTEXEC_FLAGS]
    words += [] if plugin is None else [f"--dynamicPlugins={plugin}"]
    words += [] if timing_cache is None else [f"--timingCacheFile={timing_cache}"]
    for i, profile in enumerate(profiles):
        words.append(f"--profile={i}")
        for j, option in enumerate(("--minShapes", "--optShapes", "--maxShapes")):
            shapes = ",".join(f"{name}:{'x'.join(map(str, shapes[j]))}" for name, shapes in profile.items())
            words.append(f"{option}={shapes}")
    return shlex.join(words)


def polygraphy(
    file: str | Path,
    plan: str | Path,
    profiles: Sequence[Profile],
    *,
    plugin: str | Path | None,
    timing_cache: str | Path | None = None,
) -> str:
    """The line that builds `plan` of `file` with polygraphy, which keeps TF32 off unless it is told."""
    words = ["polygraphy", "convert", str(file), "--convert-to", "trt", "-o", str(plan)]
    words += _polygraphy_options(profiles, plugin)
    words += [] if timing_cache is None else [f"--{verb}-timing-cache={timing_cache}" for verb in ("load", "save")]
    return shlex.join(words)


def polygraphy_compare(
    file: str | Path, profiles: Sequence[Profile], *, plugin: str | Path | None, tolerance: float = 1e-3
) -> str:
    """The line that builds an engine and compares it with the function body in ONNX Runtime, on random inputs of the
    usual prompt: small integers, which are tokens and harmless states."""
    usual = [f"{name}:{_list(shapes[1])}" for name, shapes in profiles[PREFILL].items()]
    words = ["polygraphy", "run", str(file), "--trt", "--onnxrt", *_polygraphy_options(profiles[:1], plugin)]
    words += ["--input-shapes", *usual, "--val-range", "[0,1]", "--atol", str(tolerance), "--rtol", str(tolerance)]
    return shlex.join(words)


def _polygraphy_options(profiles: Sequence[Profile], plugin: str | Path | None) -> list[str]:
    words = ["--strongly-typed"]
    words += [] if plugin is None else ["--plugins", str(plugin)]
    for profile in profiles:
        for j, option in enumerate(("--trt-min-shapes", "--trt-opt-shapes", "--trt-max-shapes")):
            words += [option, *(f"{name}:{_list(shapes[j])}" for name, shapes in profile.items())]
    return words


def _list(shape: Shape) -> str:
    return f"[{','.join(map(str, shape))}]"
