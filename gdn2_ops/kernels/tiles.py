"""The table of tile sizes: one row for every (kernel, dtype, head sizes, architecture), and no search at run time.

The launcher, the ahead-of-time compiler (export/kernels.py) and the manifest of the TensorRT plugin read the same row,
so what was built is what is launched and a first request never compiles. Every point of the table has exactly one row:
tests/test_tiles.py refuses two.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

HEAD_SIZES = (32, 64, 128, 256)  # a kernel is compiled for these; sizes between them are masked
ARCHS = (80, 90, 100, 120)  # compute capabilities that have rows; the rows of 80 serve 86 and 89, of 100 103
ANY_ARCH = ARCHS
HALF = ("bf16", "fp16")
ANY_DTYPE = ("fp32", *HALF)  # of q; decays are float32 always
SHARED_MEMORY = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}  # bytes of one program; 80: what 86 has


@dataclass(frozen=True)
class Tile:
    """The constexprs that a kernel is compiled with besides its own options, and how many warps run a program."""

    constexprs: Mapping[str, int]
    num_warps: int
    num_stages: int = 1


@dataclass(frozen=True)
class _Row:
    kernel: str
    dtypes: tuple[str, ...]
    K: tuple[int, ...]
    V: tuple[int, ...]
    archs: tuple[int, ...]
    tile: Tile

    def covers(self, kernel: str, dtype: str, K: int, V: int, arch: int) -> bool:
        return kernel == self.kernel and dtype in self.dtypes and K in self.K and V in self.V and arch in self.archs


# kernel, dtypes of q, K, V (of HEAD_SIZES), architectures: tile
ROWS = (
    # step: a program holds [K, 32] of the state, 32 numbers a thread: eight 16-byte loads in flight.
    *(
        _Row(kernel, ANY_DTYPE, (K,), HEAD_SIZES, ANY_ARCH, Tile({"BV": 32}, num_warps=K // 32))
        for kernel in ("step", "step_bf16_state")
        for K in HEAD_SIZES
    ),
    # step_layer: whole value heads up to 16384 numbers of a state, for the norm over them; 64 numbers a thread.
    *(
        _Row("step_layer", ANY_DTYPE, (K,), (V,), ANY_ARCH, Tile({"BV": BV}, num_warps=max(1, K * BV // 2048)))
        for K in HEAD_SIZES
        for V in HEAD_SIZES
        for BV in (min(V, 16384 // K),)
    ),
    # step_layer_masked: each load has an address and a predicate of its own, so that 32 numbers a thread spill.
    *(
        _Row("step_layer_masked", ANY_DTYPE, (K,), HEAD_SIZES, ANY_ARCH, Tile({"BV": 32}, num_warps=min(8, K // 16)))
        for K in HEAD_SIZES
    ),
    # prepare: slices of 16 keys, since with 32 the scores of a chunk and what waits for A spill.
    _Row("prepare", ANY_DTYPE, HEAD_SIZES, HEAD_SIZES, ANY_ARCH, Tile({"C": 64, "BK": 16}, num_warps=8)),
    # recur: [K, BV] of the state in registers. Two stages prefetch a chunk's operands where shared memory holds them
    # twice.
    *(
        _Row("recur", dtypes, KS, (V,), archs, Tile({"C": 64, "BV": min(V, BV)}, num_warps, num_stages))
        for dtypes, KS, archs, BV, num_warps, num_stages in (
            (HALF, (32, 64, 128), (90,), 64, 4, 2),
            (HALF, (32, 64, 128), (100,), 64, 4, 1),
            (HALF, (32, 64, 128), (80, 120), 32, 4, 1),
            (HALF, (256,), (90,), 64, 8, 1),
            (HALF, (256,), (80, 100, 120), 32, 8, 1),
            (("fp32",), HEAD_SIZES, ANY_ARCH, 16, 8, 1),
        )
        for V in HEAD_SIZES
    ),
    # recur_masked: each number of a value, output or state has an address and a predicate of its own.
    *(
        _Row("recur_masked", dtypes, KS, HEAD_SIZES, archs, Tile({"C": 64, "BV": 16}, num_warps, num_stages))
        for dtypes, KS, archs, num_warps, num_stages in (
            (HALF, (32, 64, 128), (90,), 4, 2),
            (HALF, (32, 64, 128), (80, 100, 120), 4, 1),
            (HALF, (256,), ANY_ARCH, 8, 1),
            (("fp32",), HEAD_SIZES, ANY_ARCH, 8, 1),
        )
    ),
    # summarise: as recur, without outputs. chain: M in slices of BK columns.
    _Row("summarise", HALF, (32, 64, 128), HEAD_SIZES, ANY_ARCH, Tile({"C": 64, "BV": 32}, num_warps=4)),
    _Row("summarise", HALF, (256,), HEAD_SIZES, ANY_ARCH, Tile({"C": 64, "BV": 32}, num_warps=8)),
    _Row("summarise", ("fp32",), HEAD_SIZES, HEAD_SIZES, ANY_ARCH, Tile({"C": 64, "BV": 32}, num_warps=8)),
    _Row("chain", ANY_DTYPE, HEAD_SIZES, HEAD_SIZES, ANY_ARCH, Tile({"C": 64, "BK": 32, "BV": 16}, num_warps=8)),
    # recur_back: [K, BV] of the gradient of the state in registers; masked, an address and a predicate for each number.
    _Row("recur_back", HALF, HEAD_SIZES, HEAD_SIZES, ANY_ARCH, Tile({"C": 64, "BV": 32}, num_warps=4)),
    _Row("recur_back", ("fp32",), HEAD_SIZES, HEAD_SIZES, ANY_ARCH, Tile({"C": 64, "BV": 16}, num_warps=8)),
    _Row("recur_back_masked", ANY_DTYPE, HEAD_SIZES, HEAD_SIZES, ANY_ARCH, Tile({"C": 64, "BV": 16}, num_warps=8)),
    # gradients: slices of 16 keys, since with 32 the factors of four products and their gradients spill.
    _Row("gradients", HALF, HEAD_SIZES, HEAD_SIZES, ANY_ARCH, Tile({"C": 64, "BK": 16, "BV": 32}, num_warps=8)),
    _Row("gradients", ("fp32",), HEAD_SIZES, HEAD_SIZES, ANY_ARCH, Tile({"C": 64, "BK": 8, "BV": 16}, num_warps=8)),
)


# Programs of `recur` at most, chunks of a sequence at least: segments. Not measured on a GPU; the reasoning: a program
# occupies one of about 132 processors and a step is one chunk. The plain walk takes c steps. In P segments, with p
# programs, `summarise` (values and as many columns of M) takes ceil(2 p P / 132) c / P, `recur` ceil(p P / 132) c / P
# and `chain` about 1.5 P, three launches more included. Rows stand where that is below 0.7 c, with the best P.
SEGMENTS = ((4, 128, 16), (8, 256, 16), (8, 32, 8), (16, 64, 8), (16, 32, 4))


def segments(programs: int, chunks: int) -> int:
    """Into how many segments the walk over `chunks` chunks is split, where so many programs would walk: 1 is not."""
    return next((P for at_most, at_least, P in SEGMENTS if programs <= at_most and chunks >= at_least), 1)


def head_size(size: int) -> int:
    """The compiled size that serves a head of `size` channels: the next one of HEAD_SIZES."""
    for compiled in HEAD_SIZES:
        if 1 <= size <= compiled:
            return compiled
    raise NotImplementedError(f"gdn2_ops.kernels: expected a head size in 1..{HEAD_SIZES[-1]}, got {size}")


def table_arch(major: int, minor: int) -> int:
    """The architecture of the table that serves a device of this compute capability: same major, minor not above."""
    fitting = [arch for arch in ARCHS if arch // 10 == major and arch % 10 <= minor]
    if not fitting:
        raise NotImplementedError(
            f"gdn2_ops.kernels: expected a device of compute capability 8.x, 9.x, 10.x or 12.x, got {major}.{minor}; "
            "use device='cpu'"
        )
    return fitting[-1]


@functools.cache
def tile(kernel: str, dtype: str, K: int, V: int, arch: int) -> Tile:
    """The row for `kernel`, the dtype of q ("fp32", "bf16", "fp16"), head sizes up to 256 and an architecture of ARCHS.

    Raises: NotImplementedError: the table has no such row.
    """
    found = rows(kernel, dtype, K, V, arch)
    if not found:
        known = sorted({row.kernel for row in ROWS})
        raise NotImplementedError(
            f"gdn2_ops.kernels: expected a row of the table (kernels {known}, dtypes {ANY_DTYPE}, head sizes up to "
            f"{HEAD_SIZES[-1]}, architectures {ARCHS}), got {kernel!r} for {dtype}, K = {K}, V = {V}, sm_{arch}; "
            "add one to gdn2_ops/kernels/tiles.py, or use device='cpu'"
        )
    return found[0]


def rows(kernel: str, dtype: str, K: int, V: int, arch: int) -> list[Tile]:
    """Every row that covers a point. More than one is a mistake in the table."""
    point = (kernel, dtype, head_size(K), head_size(V), arch)
    return [row.tile for row in ROWS if row.covers(*point)]
