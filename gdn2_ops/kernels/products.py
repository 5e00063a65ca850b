"""Products of float32 (or float64) tiles to the digits that the dtype of q asks for.

float32 itself has no tensor core: a product is multiply-adds whose operands wait in registers, of a tile of m by n
numbers of a thread m + n for every number that is summed. So it is summed in slices of 16, one after the other.
"""

from __future__ import annotations

import triton
import triton.language as tl

SLICE = tl.constexpr(16)


@triton.jit
def product(a, b, acc, dtype: tl.constexpr):
    """acc + a b of tiles that T, A and Aqk are made of or A acts by: a rounding there grows with every later token.

    To 8 times the digits of q's dtype or more: bfloat16 in tf32, float16 in two halves of each number, float32 in
    float64 where a, b and acc are of float64. b may have q's dtype.
    """
    if dtype == tl.float16:
        a_high, b_high = a.to(dtype), b.to(dtype)
        if b.dtype == tl.float32:
            acc = tl.dot(a_high, (b - b_high.to(tl.float32)).to(dtype), acc)
        acc = tl.dot((a - a_high.to(tl.float32)).to(dtype), b_high, acc)
        return tl.dot(a_high, b_high, acc)
    elif dtype == tl.bfloat16:
        return tl.dot(a, b.to(tl.float32), acc, input_precision="tf32")
    elif a.shape[-1] == SLICE:
        return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)
    else:
        a_MSN = tl.reshape(a, [a.shape[0], a.shape[1] // SLICE, SLICE])
        for i_slice in tl.range(0, a.shape[1] // SLICE):
            here_S1 = (tl.arange(0, a.shape[1] // SLICE) == i_slice)[:, None]
            a_MN = tl.sum(tl.where(here_S1[None, :, :], a_MSN, 0.0), 1)
            acc = tl.dot(a_MN, rows(b, i_slice), acc, input_precision="ieee", out_dtype=acc.dtype)
        return acc


@triton.jit
def loaded_product(
    a_ptr, row_stride: tl.constexpr, column_stride: tl.constexpr, b_NV, acc_MV, TRIANGLE: tl.constexpr = 0
):
    """acc + a b, to the digits of the dtype of b. a is in memory, with its strides; TRIANGLE as in `triangle`."""
    EXACT: tl.constexpr = b_NV.dtype == tl.float32
    SUMMED: tl.constexpr = SLICE if EXACT else b_NV.shape[0]
    i_M, i_N = tl.arange(0, acc_MV.shape[0]), tl.arange(0, SUMMED)
    at_MN = i_M[:, None] * row_stride + i_N[None, :] * column_stride
    if EXACT:
        for i_slice in tl.range(0, b_NV.shape[0] // SLICE):
            i_N = i_slice * SLICE + tl.arange(0, SLICE)
            a_MN = triangle(a_ptr + i_slice * SLICE * column_stride + at_MN, i_M, i_N, TRIANGLE)
            acc_MV = tl.dot(a_MN, rows(b_NV, i_slice), acc_MV, input_precision="ieee")
        return acc_MV
    else:
        return tl.dot(triangle(a_ptr + at_MN, i_M, i_N, TRIANGLE), b_NV, acc_MV, input_precision="tf32")


@triton.jit
def triangle(a_ptr_MN, i_M, i_N, TRIANGLE: tl.constexpr):
    """Loads a tile: all of it, or the blocks of 16 up to the diagonal (1) or from it on (-1); the rest is zeros."""
    if TRIANGLE == 0:
        return tl.load(a_ptr_MN)
    else:
        return tl.load(a_ptr_MN, mask=TRIANGLE * (i_M[:, None] // 16 - i_N[None, :] // 16) >= 0, other=0.0)


@triton.jit
def store_a(a_ptr, a_CC, dtype: tl.constexpr):
    """A for `applied`. For bfloat16 it is float16, over a power of two where that would overflow (legal gates can make
    it 1e9, decision 0005): the exponent is in the corner above the diagonal, which no number of A needs."""
    C: tl.constexpr = a_CC.shape[0]
    i_C = tl.arange(0, C)
    if dtype == tl.bfloat16:
        exponent = tl.max(a_CC.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >> 23
        too_large = tl.maximum(exponent - 127 - 14, 0).to(tl.float32)
        a_CC *= tl.exp2(-too_large)
        tl.store(a_ptr + C - 1, too_large)
    up_to_CC = i_C[:, None] // 16 >= i_C[None, :] // 16
    tl.store(a_ptr + i_C[:, None] * C + i_C[None, :], a_CC, mask=up_to_CC)


@triton.jit
def load_a(a_ptr, C: tl.constexpr, dtype: tl.constexpr):
    """What `store_a` stored, in float32."""
    i_C = tl.arange(0, C)
    a_CC = triangle(a_ptr + i_C[:, None] * C + i_C[None, :], i_C, i_C, 1).to(tl.float32)
    if dtype == tl.bfloat16:
        a_CC *= tl.exp2(tl.load(a_ptr + C - 1).to(tl.float32))
    return a_CC


@triton.jit
def applied(a_ptr, C: tl.constexpr, x_CV, dtype: tl.constexpr):
    """A x for A in memory; in half precision two halves of each number of A, x in q's dtype."""
    acc_CV = tl.zeros(x_CV.shape, tl.float32)
    if dtype == tl.float32:
        return loaded_product(a_ptr, C, 1, x_CV, acc_CV, 1)
    else:
        a_CC = load_a(a_ptr, C, dtype)
        high_CC = a_CC.to(dtype)
        acc_CV = tl.dot((a_CC - high_CC.to(tl.float32)).to(dtype), x_CV, acc_CV)
        return tl.dot(high_CC, x_CV, acc_CV)


@triton.jit
def rows(b_NV, i_slice):
    """One slice of the rows of a tile in registers: a sum of itself and zeros."""
    SLICES: tl.constexpr = b_NV.shape[0] // SLICE
    here_S = tl.arange(0, SLICES) == i_slice
    b_SNV = tl.reshape(b_NV, [SLICES, SLICE, b_NV.shape[1]])
    return tl.sum(tl.where(here_S[:, None, None], b_SNV, 0.0), 0)
