"""Triton kernels -> cubins and a manifest, on a machine without a GPU: what a plugin embeds and launches.

The manifest says all that a launcher in another language needs: for every cubin its file, symbol, target, the types
of its parameters in order, threads, shared memory, constexprs and the rule of its grid. A target with a letter,
sm_90a, serves that compute capability alone, one without, sm_80, later ones of the same major version too. Pointers
are multiples of 16 bytes. A head is served by the next of `head_sizes`: MASKED = 0 is for heads of exactly K and V
channels, 1 for smaller ones. `segments` is the table of that name in gdn2_ops/kernels/tiles.py. Triton appends hidden
parameters to those that the kernel declares, pointers to scratch memory: a caller passes nulls, since kernels that
would use them are refused here.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import itertools
import json
import multiprocessing
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from gdn2_ops.kernels import tiles

MANIFEST = "manifest.json"
FORMAT = 1  # of the manifest; another one when a reader of this one would be wrong
HIDDEN_PARAMETERS = ("global_scratch", "profile_scratch")
_LAUNCHES = ("launch_cooperative_grid", "launch_cluster", "launch_pdl")  # that need more than cuLaunchKernel
SIZES = {"i32": 4, "fp32": 4, "i64": 8}  # bytes of a parameter; pointers have 8


@dataclass(frozen=True)
class Build:
    """One cubin: a kernel of the catalog for a dtype of q, compiled head sizes, an architecture and options."""

    kernel: str
    dtype: str
    K: int
    V: int
    arch: int
    options: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        options = "".join(f"-{name.lower()}{value}" for name, value in self.options)
        return f"{self.kernel}-{self.dtype}-k{self.K}-v{self.V}{options}-sm{self.arch}"


def plan(
    archs: Iterable[int] = tiles.ARCHS,
    head_sizes: Iterable[tuple[int, int]] = tuple(zip(tiles.HEAD_SIZES, tiles.HEAD_SIZES)),
    dtypes: Iterable[str] = tiles.ANY_DTYPE,
    kernels: Iterable[str] | None = None,
) -> list[Build]:
    """Every cubin of a selection. Points that the table of tiles does not have are left out.

    Raises: ValueError: an architecture, head size, dtype or kernel that no row of the table knows.
    """
    from gdn2_ops.kernels.catalog import catalog

    described = {kernel.name: kernel for kernel in catalog()}
    names = tuple(described if kernels is None else kernels)
    archs, head_sizes, dtypes = tuple(archs), tuple(head_sizes), tuple(dtypes)
    _expect("architectures", archs, tiles.ARCHS)
    _expect("head sizes", tuple(itertools.chain(*head_sizes)), tiles.HEAD_SIZES)
    _expect("dtypes", dtypes, tiles.ANY_DTYPE)
    _expect("kernels", names, tuple(described))
    builds = []
    for name, dtype, (K, V), arch in itertools.product(names, dtypes, head_sizes, archs):
        if tiles.rows(name, dtype, K, V, arch):
            options = described[name].options
            for values in itertools.product(*options.values()):
                builds.append(Build(name, dtype, K, V, arch, tuple(zip(options, values))))
    return builds


def build_kernels(output: str | Path, builds: list[Build], *, jobs: int | None = None, report=None) -> Path:
    """Writes the cubins and their manifest into the folder `output`, which is made. Returns the manifest's path.

    Args:
        jobs: processes to compile in; None is one for each core.
        report: called with (done, all) after every cubin.

    Raises: RuntimeError: Triton interprets in this process, or a kernel cannot be launched from a cubin alone.
    """
    from gdn2_ops.kernels.kernel import interpreted

    if interpreted():
        raise RuntimeError("gdn2_ops.export.kernels: expected a compiling Triton, got TRITON_INTERPRET=1; unset it")
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    spawned = multiprocessing.get_context("spawn")  # a forked process would inherit locks of torch's threads
    with concurrent.futures.ProcessPoolExecutor(jobs or os.cpu_count(), mp_context=spawned) as processes:
        for build, (entry, cubin) in zip(builds, processes.map(compile_one, builds)):
            (folder / f"{build.name}.cubin").write_bytes(cubin)
            entries.append(entry)
            if report is not None:
                report(len(entries), len(builds))
    manifest = {
        "format": FORMAT,
        "triton": _triton_version(),
        "pointer_alignment": 16,
        "hidden_parameters": list(HIDDEN_PARAMETERS),
        "head_sizes": list(tiles.HEAD_SIZES),
        "segments": [list(row) for row in tiles.SEGMENTS],
        "kernels": entries,
    }
    path = folder / MANIFEST
    path.write_text(json.dumps(manifest, indent=1) + "\n")
    return path


def compile_one(build: Build) -> tuple[dict, bytes]:
    """The entry of the manifest and the cubin."""
    compiled, types, constexprs, tile = compiled_kernel(build)
    metadata, cubin = compiled.metadata, compiled.asm["cubin"]
    grid = _kernel(build).grid
    refuse_what_a_cubin_cannot_carry(build, metadata, compiled.asm["ptx"], types)
    parameters = [{"name": name, "type": kind, "size": SIZES.get(kind, 8)} for name, kind in types.items()]
    entry = asdict(build) | {"name": build.name, "options": dict(build.options), "file": f"{build.name}.cubin"}
    return entry | {
        "sha256": hashlib.sha256(cubin).hexdigest(),
        "bytes": len(cubin),
        "symbol": metadata.name,
        "target": re.search(r"\.target (\w+)", compiled.asm["ptx"])[1],  # type: ignore[index]
        "constexprs": constexprs,
        "threads": 32 * tile.num_warps,
        "shared_memory": metadata.shared,
        "parameters": parameters,
        "grid": grid,
    }, cubin


def compiled_kernel(build: Build):
    """Triton's compiled kernel, the types of its parameters, its constexprs and its tile."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = _kernel(build)
    constexprs, tile = kernel.constexprs(build.dtype, build.K, build.V, build.arch, **dict(build.options))
    types = kernel.parameter_types(build.dtype)
    names = kernel.function.arg_names
    declared = [name.removesuffix("_ptr") for name in names if name not in constexprs]
    if declared != list(types) or set(constexprs) - set(names):
        raise RuntimeError(f"gdn2_ops.export.kernels: {build.kernel} declares {declared}, its types are {list(types)}")
    signature = {name: "constexpr" if name in constexprs else types[name.removesuffix("_ptr")] for name in names}
    aligned = [["tt.divisibility", 16]]
    attributes = {(i,): aligned for i, name in enumerate(names) if signature[name].startswith("*")}
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True  # paths of this machine, and half of the size
        compiled = triton.compile(
            ASTSource(kernel.function, signature, constexprs, attributes),
            target=GPUTarget("cuda", build.arch, 32),
            options={"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True},
        )
    return compiled, types, constexprs, tile


def refuse_what_a_cubin_cannot_carry(build: Build, metadata, ptx: str, types: dict[str, str]) -> None:
    """Raises RuntimeError where pointers, numbers, threads and shared memory are not all that a launch needs."""
    for what in ("global_scratch_size", "profile_scratch_size", "tensordesc_meta", *_LAUNCHES):
        found = getattr(metadata, what, None)
        if found:
            raise RuntimeError(f"gdn2_ops.export.kernels: {build.name}: expected {what} of nothing, got {found}")
    if metadata.num_ctas != 1:
        raise RuntimeError(
            f"gdn2_ops.export.kernels: {build.name}: expected no clusters, got {metadata.num_ctas} blocks"
        )
    if metadata.shared > tiles.SHARED_MEMORY[build.arch]:
        most = tiles.SHARED_MEMORY[build.arch]
        raise RuntimeError(
            f"gdn2_ops.export.kernels: {build.name}: expected at most {most} bytes of shared memory, "
            f"got {metadata.shared}; give it a smaller tile in gdn2_ops/kernels/tiles.py"
        )
    threads = int(re.search(r"\.reqntid (\d+)", ptx)[1])  # type: ignore[index]
    if threads != 32 * metadata.num_warps:
        raise RuntimeError(
            f"gdn2_ops.export.kernels: {build.name}: expected {32 * metadata.num_warps} threads, got {threads}"
        )
    got = [int(bits) // 8 for bits in re.findall(r"\.param \.[a-z](\d+)", ptx[ptx.index(".entry") :].split(")")[0])]
    want = [SIZES.get(kind, 8) for kind in types.values()] + [8] * len(HIDDEN_PARAMETERS)
    if got != want:
        raise RuntimeError(f"gdn2_ops.export.kernels: {build.name}: expected parameters of {want} bytes, got {got}")


def _kernel(build: Build):
    from gdn2_ops.kernels.catalog import catalog

    return next(kernel for kernel in catalog() if kernel.name == build.kernel)


def _triton_version() -> str:
    import triton

    return triton.__version__


def _expect(what: str, got: tuple, known: tuple) -> None:
    if not got or set(got) - set(known):
        raise ValueError(f"gdn2_ops.export.kernels: expected {what} among {known}, got {got}")
