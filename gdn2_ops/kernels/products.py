"""Products of float32 (or float64) tiles to the digits that the dtype of q asks for, and how the lower triangular
matrices of a chunk are stored.

float32 itself has no tensor core: a product is multiply-adds whose operands wait in registers, of a tile of m by n
numbers of a thread m + n for every number that is summed. So it is summed in slices of 16, one after the other.
"""

from __future__ import annotations

import triton
import triton.language as tl

SLICE = tl.constexpr(16)


@triton.jit
def halves(a, dtype: tl.constexpr):
    """Two numbers of half precision whose sum each float32 of a is, to twice their digits."""
    high = a.to(dtype)
    return high, (a - high.to(tl.float32)).to(dtype)


@triton.jit
def product(a, b, acc, dtype: tl.constexpr):
    """acc + a b of tiles that T, A and Aqk are made of or A acts by: a rounding there grows with every later token.

    To 8 times the digits of q's dtype or more: bfloat16 in tf32, float16 in two halves of each number, float32 in
    float64 where a, b and acc are of float64. b may have q's dtype.
    """
    if dtype == tl.float16:
        a_high, a_rest = halves(a, dtype)
        if b.dtype == tl.float32:
            b_high, b_rest = halves(b, dtype)
            acc = tl.dot(a_high, b_rest, acc)
        else:
            b_high = b.to(dtype)
        acc = tl.dot(a_rest, b_high, acc)
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
    """acc + a b, to the digits of the dtype of b. a is in memory, with its strides."""
    EXACT: tl.constexpr = b_NV.dtype == tl.float32
    SUMMED: tl.constexpr = SLICE if EXACT else b_NV.shape[0]
    i_M, i_N = tl.arange(0, acc_MV.shape[0]), tl.arange(0, SUMMED)
    if EXACT:
        for i_slice in tl.range(0, b_NV.shape[0] // SLICE):
            a_MN = loaded(a_ptr, i_M, i_N + i_slice * SLICE, row_stride, column_stride, TRIANGLE)
            acc_MV = tl.dot(a_MN, rows(b_NV, i_slice), acc_MV, input_precision="ieee")
        return acc_MV
    else:
        a_MN = loaded(a_ptr, i_M, i_N, row_stride, column_stride, TRIANGLE)
        return tl.dot(a_MN, b_NV, acc_MV, input_precision="tf32")


@triton.jit
def triangle_product(a_ptr, b_NV, acc_MV, TRIANGLE: tl.constexpr):
    """acc + a b as `loaded_product`, of a stored by `store_triangle` (1), or of its transpose (-1)."""
    return loaded_product(a_ptr, 0, 0, b_NV, acc_MV, TRIANGLE)


@triton.jit
def loaded(a_ptr, i_M, i_N, row_stride: tl.constexpr, column_stride: tl.constexpr, TRIANGLE: tl.constexpr):
    """Rows i_M and columns i_N of a tile with these strides; or, with TRIANGLE, of what `store_triangle` has stored (1)
    or of its transpose (-1), with zeros where nothing is."""
    if TRIANGLE == 0:
        return tl.load(a_ptr + i_M[:, None] * row_stride + i_N[None, :] * column_stride)
    elif TRIANGLE == 1:
        at_MN, stored_MN = in_triangle(i_M[:, None], i_N[None, :])
        return tl.load(a_ptr + at_MN, mask=stored_MN, other=0.0)
    else:
        at_MN, stored_MN = in_triangle(i_N[None, :], i_M[:, None])
        return tl.load(a_ptr + at_MN, mask=stored_MN, other=0.0)


@triton.constexpr_function
def triangle_size(C):
    """Numbers that are stored of a lower triangular [C, C]."""
    return C * (C + 16) // 2


@triton.jit
def in_triangle(row, column):
    """Where a number of a lower triangular matrix is stored, and whether it is: of its blocks of 16 by 16 those up to
    the diagonal, row by row of blocks, are whole and one after the other."""
    i_block = row // 16 * (row // 16 + 1) // 2 + column // 16
    return i_block * 256 + row % 16 * 16 + column % 16, row // 16 >= column // 16


@triton.jit
def store_triangle(a_ptr, a_CC):
    i_C = tl.arange(0, a_CC.shape[0])
    at_CC, stored_CC = in_triangle(i_C[:, None], i_C[None, :])
    tl.store(a_ptr + at_CC, a_CC, mask=stored_CC)


@triton.jit
def load_triangle(a_ptr, C: tl.constexpr):
    i_C = tl.arange(0, C)
    return loaded(a_ptr, i_C, i_C, 0, 0, 1)


CORNER = tl.constexpr(15)  # where row 0, column 15 is: stored, but above the diagonal


@triton.jit
def store_a(a_ptr, a_CC, dtype: tl.constexpr):
    """A for `applied`. For bfloat16 it is float16, over a power of two where that would overflow (legal gates can make
    it 1e9, decision 0005): the exponent takes the place of a zero, in the corner."""
    if dtype == tl.bfloat16:
        i_C = tl.arange(0, a_CC.shape[0])
        exponent = tl.max(a_CC.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >> 23
        too_large = tl.maximum(exponent - 127 - 14, 0).to(tl.float32)
        corner_CC = (i_C[:, None] == 0) & (i_C[None, :] == CORNER)
        a_CC = tl.where(corner_CC, too_large, a_CC * tl.exp2(-too_large))
    store_triangle(a_ptr, a_CC)


@triton.jit
def load_a(a_ptr, C: tl.constexpr, dtype: tl.constexpr):
    """What `store_a` stored, in float32."""
    a_CC = load_triangle(a_ptr, C).to(tl.float32)
    if dtype == tl.bfloat16:
        i_C = tl.arange(0, C)
        unit = tl.exp2(tl.load(a_ptr + CORNER).to(tl.float32))
        a_CC = tl.where(i_C[:, None] >= i_C[None, :], a_CC * unit, 0.0)
    return a_CC


@triton.jit
def applied(a_ptr, C: tl.constexpr, x_CV, dtype: tl.constexpr):
    """A x for A in memory; in half precision two halves of each number of A, x in q's dtype."""
    acc_CV = tl.zeros(x_CV.shape, tl.float32)
    if dtype == tl.float32:
        return triangle_product(a_ptr, x_CV, acc_CV, 1)
    else:
        high_CC, rest_CC = halves(load_a(a_ptr, C, dtype), dtype)
        acc_CV = tl.dot(rest_CC, x_CV, acc_CV)
        return tl.dot(high_CC, x_CV, acc_CV)


@triton.jit
def rows(b_NV, i_slice):
    """One slice of the rows of a tile in registers: a sum of itself and zeros."""
    SLICES: tl.constexpr = b_NV.shape[0] // SLICE
    here_S = tl.arange(0, SLICES) == i_slice
    b_SNV = tl.reshape(b_NV, [SLICES, SLICE, b_NV.shape[1]])
    return tl.sum(tl.where(here_S[:, None, None], b_SNV, 0.0), 0)
