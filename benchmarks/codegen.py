"""What compilers made of kernels, without a GPU: `python -m benchmarks.codegen --arch 90` prints JSON rows.

Ours are the cubins of gdn2_ops.export.kernels. The peer's are compiled from the launches that its own host code makes
on CPU tensors, which are recorded in place of launching: for each kernel every configuration that it would try on a
Hopper, of which the row is the one that spills least.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import fla_peer, traffic

PATTERNS = {
    "HGMMA": r"\bHGMMA",  # tensor cores of Hopper, from shared memory
    "UTCMMA": r"\bUTC[A-Z]*MMA",  # of Blackwell
    "HMMA": r"\bHMMA",
    "LDG": r"\bLDG\b",
    "LDG.128": r"\bLDG\S*\.128",
    "LDL": r"\bLDL",
    "STL": r"\bSTL",
    "BAR": r"\bBAR\.",
}
SHARED_PER_SM = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10, 120: 100 << 10}
WARPS_PER_SM = {80: 64, 90: 64, 100: 64, 120: 48}
# Values of options that rows are for; options with other names have all of theirs.
REPORTED = {"MASKED": 0, "PACKED": 0, "STATE": 1, "SLOTS": 0}


def inspect(cubin: bytes) -> dict[str, int]:
    """registers and stack bytes of a thread (a stack is spills, these kernels have no arrays), instructions by name."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        code = _cuobjdump("-sass", file.name)
    counts = {name: len(re.findall(pattern, code)) for name, pattern in PATTERNS.items()}
    numbers = {name: re.search(rf"\b{name}:(\d+)", usage) for name in ("REG", "STACK")}
    if None in numbers.values():
        raise RuntimeError(f"benchmarks.codegen: expected REG and STACK from cuobjdump -res-usage, got {usage!r}")
    return {"registers": int(numbers["REG"][1]), "stack": int(numbers["STACK"][1]), **counts}  # type: ignore[index]


def blocks_per_sm(registers: int, shared: int, warps: int, arch: int) -> int:
    """Programs that fit a multiprocessor: 64 K registers given out in 256 a warp, shared memory with 1 KB a block."""
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * warps)
    return min(32, WARPS_PER_SM[arch] // warps, by_registers, SHARED_PER_SM[arch] // (shared + 1024))


def _cuobjdump(*arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def reported_builds(archs: list[int]):
    """One build for each kernel and way of running it: bf16 with heads of 128 everywhere; on sm_90 other sizes too."""
    from gdn2_ops.export.kernels import plan

    points = [plan([arch], [(128, 128)], ["bf16"]) for arch in archs]
    if 90 in archs:
        points += [plan([90], [(64, 64), (256, 256)], ["bf16"]), plan([90], [(128, 128)], ["fp32"])]
    return [
        build
        for builds in points
        for build in builds
        if all(REPORTED.get(name, value) == value for name, value in build.options)
    ]


def our_row(build) -> dict[str, Any]:
    from gdn2_ops.export.kernels import compile_one

    entry, cubin = compile_one(build)
    found = {name: entry[name] for name in ("kernel", "dtype", "K", "V", "arch", "options", "constexprs")}
    warps, shared = entry["threads"] // 32, entry["shared_memory"]
    code = inspect(cubin)
    blocks = blocks_per_sm(code["registers"], shared, warps, build.arch)
    return {"who": "gdn2_ops", **found, "warps": warps, "shared": shared, **code, "blocks_per_sm": blocks}


def peer_rows(arch: int) -> Iterator[dict[str, Any]]:
    """A row for each kernel of fla-core's forward, backward and step: bf16, heads of 128."""
    best: dict[str, dict[str, Any]] = {}
    for name, source, options in recorded_launches():
        row = _peer_row(name, source, options, arch)
        if "stack" in row and (name not in best or row["stack"] < best[name]["stack"]):
            best[name] = row | {"configurations": best.get(name, {}).get("configurations", 0)}
        if name in best:
            best[name]["configurations"] += 1
    yield from best.values()


def _peer_row(name: str, source, options: dict[str, int], arch: int) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget

    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:
        print(f"{name} {options}: {type(error).__name__}", file=sys.stderr)
        return {}
    code, shared, warps = inspect(compiled.asm["cubin"]), compiled.metadata.shared, compiled.metadata.num_warps
    row = {"who": "fla-core", "kernel": name, "dtype": "bf16", "K": 128, "V": 128, "arch": arch, "warps": warps}
    return row | {"shared": shared, **code, "blocks_per_sm": blocks_per_sm(code["registers"], shared, warps, arch)}


def recorded_launches() -> list[tuple[str, Any, dict[str, int]]]:
    """(kernel, source, options) of every launch and configuration of fla-core's forward, backward and step."""
    _pretend_hopper()
    from triton.compiler import ASTSource
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    found: dict[str, tuple[str, Any, dict[str, int]]] = {}

    def record(self, *arguments, grid, warmup, **keywords):
        values = dict(zip(self.arg_names, arguments)) | {n: x for n, x in keywords.items() if n in self.arg_names}
        options = {n: x for n, x in keywords.items() if n in ("num_warps", "num_stages")}
        signature, constants, attributes = {}, {}, {}
        for i, parameter in enumerate(self.params):
            kind = _type(parameter, values.get(parameter.name))
            signature[parameter.name] = kind
            if kind == "constexpr":
                constants[(i,)] = values.get(parameter.name)
            elif kind.startswith("*"):
                attributes[(i,)] = [["tt.divisibility", 16]]
        name = self.fn.__name__
        found[f"{name} {constants} {options}"] = (name, ASTSource(self, signature, constants, attributes), options)

    def every_configuration(self, *arguments, **keywords):
        self.nargs = dict(zip(self.arg_names, arguments))
        for configuration in self.configs:
            self.fn.run(*arguments, **keywords, **configuration.all_kwargs())

    JITFunction.run, Autotuner.run = record, every_configuration  # type: ignore[method-assign]
    six, state = traffic.problem(128, torch.bfloat16)
    fla_peer.step_inplace(*(x[:, 0] for x in six), state, 1.0)
    leaves = [x.requires_grad_() for x in (*six, state)]
    outputs = fla_peer.chunk(*leaves, 1.0, safe_gate=True)
    torch.autograd.grad(outputs, leaves, [torch.zeros_like(x) for x in outputs])
    return list(found.values())


def _type(parameter, value) -> str:
    kinds = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}
    if parameter.is_constexpr or value is None or isinstance(value, bool):
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return kinds[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i64" if "64" in str(parameter.annotation) else "i32"


def _pretend_hopper() -> None:
    """fla-core chooses its configurations by the GPU that it sees on import."""
    if fla_peer.missing():
        raise ImportError(f"benchmarks.codegen: fla-core is {fla_peer.missing()}")
    import fla.utils

    flags = {"IS_NVIDIA": True, "IS_NVIDIA_HOPPER": True, "IS_TF32_SUPPORTED": True, "IS_GATHER_SUPPORTED": True}
    for name, value in flags.items():
        setattr(fla.utils, name, value)
    fla.utils.check_shared_mem = lambda arch="none", tensor_idx=0: True


def main() -> None:
    from gdn2_ops.export.kernels import plan

    parser = argparse.ArgumentParser(description="registers, spills and tensor core instructions, as JSON")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100, 120])
    parser.add_argument(
        "--every", action="store_true", help="every build with heads of 128, masked and packed ones too"
    )
    parser.add_argument("--peer", action="store_true", help="fla-core too (minutes for each architecture)")
    options = parser.parse_args()
    builds = plan(options.arch, [(128, 128)]) if options.every else reported_builds(options.arch)
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as processes:
        rows = list(processes.map(our_row, builds))
    print(json.dumps(rows + [row for arch in options.arch if options.peer for row in peer_rows(arch)]))


if __name__ == "__main__":
    main()
