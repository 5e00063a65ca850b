"""What a kernel is to those who launch it, build it ahead of time and write the manifest of its cubins."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton

from gdn2_ops.kernels import tiles

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
A_DTYPES = {"fp32": torch.float32, "bf16": torch.float16, "fp16": torch.float32}  # of A by that of q (decision 0005)
INTERPRETED_ARCH = 90  # whose tiles the interpreter runs


@dataclass(frozen=True)
class Kernel:
    """One Triton kernel.

    name: in tiles.py and in the names of its cubins.
    function: the jitted function. Its parameters are those of `types` in order, then constexprs: K, V (the compiled
        head sizes), those of `options` and those of its tile.
    types: run-time parameters in order, as Triton writes types: "*fp32", "*i64", "i32", "fp32"; "*q" is a pointer to
        the dtype of q, "*a" to that of A. Integers are declared in do_not_specialize, so that a size never compiles
        anew.
    options: the constexprs of the call and every value they are built for ahead of time.
    grid: of programs, in the sizes of the call: what a caller from another language launches.
    """

    name: str
    function: Any
    types: Mapping[str, str]
    grid: str
    options: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def parameter_types(self, dtype: str) -> dict[str, str]:
        """Run-time parameters in order with "*q" and "*a" replaced."""
        replaced = {"*q": f"*{dtype}", "*a": f"*{DTYPES[A_DTYPES[dtype]]}"}
        return {name: replaced.get(kind, kind) for name, kind in self.types.items()}

    def constexprs(self, dtype: str, K: int, V: int, arch: int, **options: int) -> tuple[dict[str, int], tiles.Tile]:
        """Every constexpr of one build, and the row of the table it comes from."""
        tile = tiles.tile(self.name, dtype, K, V, arch)
        return {"K": tiles.head_size(K), "V": tiles.head_size(V), **options, **tile.constexprs}, tile

    def launch(
        self, grid, device: torch.device, dtype: torch.dtype, K: int, V: int, *arguments, **options: int
    ) -> None:
        """Starts the kernel on the current stream. grid: a tuple, or a function of the constexprs.

        dtype: of q. K, V: head sizes of the call, which are not the compiled ones where channels are masked.
        """
        constexprs, tile = self.constexprs(DTYPES[dtype], K, V, arch(device), **options)
        blocks = grid(constexprs) if callable(grid) else grid
        if 0 in blocks:
            return
        launched = self.function[blocks]
        with _current(device):
            launched(*arguments, **constexprs, num_warps=tile.num_warps, num_stages=tile.num_stages)


def is_masked(K: int, V: int) -> int:
    """The option MASKED: 1 where a head is smaller than the compiled size that serves it."""
    return int(tiles.head_size(K) != K or tiles.head_size(V) != V)


def expect(
    kernel: str, name: str, x: torch.Tensor, shape: tuple, dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """Raises ValueError or TypeError unless x is what a launcher will read: the last guard before raw pointers."""
    if x.dtype not in dtypes:
        raise TypeError(
            f"gdn2_ops.kernels.{kernel}: expected {name} of dtype {' or '.join(map(str, dtypes))}, got {x.dtype}"
        )
    if x.shape != shape:
        raise ValueError(f"gdn2_ops.kernels.{kernel}: expected {name} of shape {tuple(shape)}, got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"gdn2_ops.kernels.{kernel}: expected {name} on {device}, got {x.device}")


def arch(device: torch.device) -> int:
    """The architecture of the table for tensors on `device`: a GPU, or the CPU under TRITON_INTERPRET=1."""
    if device.type == "cuda":
        return _cuda_arch(device.index if device.index is not None else torch.cuda.current_device())
    if device.type == "cpu" and interpreted():
        return INTERPRETED_ARCH
    raise NotImplementedError(
        f"gdn2_ops.kernels: expected tensors on cuda, got {device.type}; the interpreter runs CPU tensors where "
        "TRITON_INTERPRET=1 is set before this package is imported"
    )


def interpreted() -> bool:
    """Whether this process runs kernels in Triton's interpreter."""
    return bool(triton.knobs.runtime.interpret)


@functools.cache
def _cuda_arch(index: int) -> int:
    return tiles.table_arch(*torch.cuda.get_device_capability(index))


def _current(device: torch.device):
    """Triton launches on the current device, whatever the tensors are on. Making it current takes microseconds."""
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        return torch.cuda.device(device)
    return contextlib.nullcontext()
