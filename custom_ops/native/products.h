// Small dense products of the backward pass. Matrices are fp32, row-major, padded to whole vectors; a leading dimension is
// called ld. CHUNK x CHUNK triangles are applied row by row and never touched above the diagonal.
#pragma once

#include "ahead.h"
#include "simd.h"

namespace gdn2 {
namespace GDN2_ISA {

// The left factor of a product, read one number at a time: element (m, i) at data[m * row + i * column]. A far one lies
// dense in memory rather than in a cache: the rows of the next block are fetched line by line during this one.
struct Left {
  const float* data;
  int64_t row, column;
  bool far = false;
};

enum class Start { zero, add, scaled };  // what the sums begin with: 0, start, or Diag(scale) start

template <int NV, Start START>
GDN2_INLINE void product_panel(Ahead& ahead, int64_t M, int64_t inner, Left a, const float* b, int64_t ld_b, const float* start,
                               const float* scale, float* out, int64_t ld) {
  constexpr int MR = PRODUCT_ROWS;
  for (int64_t m = 0; m < M; m += MR) {
    Vec sums[MR][NV];
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      for (int c = 0; c < NV; ++c) {
        sums[i][c] = START == Start::zero ? set(0.0f) : load(start + (m + i) * ld + c * LANES);
        if (START == Start::scaled) sums[i][c] = sums[i][c] * set(scale[m + i]);
      }
    }
    ahead.fetch();
    const float* a_m = a.data + m * a.row;
    const float* b_i = b;
    for (int64_t x = 0; x < inner; ++x, a_m += a.column, b_i += ld_b) {
      Vec b_c[NV];
      for (int c = 0; c < NV; ++c) b_c[c] = load(b_i + c * LANES);
      if (a.far && x * MR * 4 % CACHE_LINE == 0) __builtin_prefetch(a.data + (m + MR) * a.row + x * MR, 0, 3);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        const Vec a_i = set(a_m[i * a.row]);
        for (int c = 0; c < NV; ++c) sums[i][c] = fma(a_i, b_c[c], sums[i][c]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      for (int c = 0; c < NV; ++c) store(out + (m + i) * ld + c * LANES, sums[i][c]);
    }
  }
}

// How often a product looks ahead.
inline int64_t panels(int64_t M, int64_t N) { return M / PRODUCT_ROWS * ceil_div(N, 2 * LANES); }

// out[M, N] = start + a[M, inner] b[inner, N]; M and N multiples of 16; out may be start, both with leading dimension ld.
template <Start START>
void product(Ahead& ahead, int64_t M, int64_t N, int64_t inner, Left a, const float* b, int64_t ld_b, const float* start,
             const float* scale, float* out, int64_t ld) {
  int64_t c = 0;
  for (; c + 2 * LANES <= N; c += 2 * LANES) {
    product_panel<2, START>(ahead, M, inner, a, b + c, ld_b, start + c, scale, out + c, ld);
  }
  for (; c < N; c += LANES) product_panel<1, START>(ahead, M, inner, a, b + c, ld_b, start + c, scale, out + c, ld);
}

// x := (I + tril(t, -1))^-1 x
inline void solve_lower(const float* t_CC, float* x, int64_t N) {
  for (int64_t c = 0; c < N; c += LANES) {
    for (int64_t i = 1; i < CHUNK; ++i) {
      Vec x_i = load(x + i * N + c);
      for (int64_t j = 0; j < i; ++j) x_i = fnma(set(t_CC[i * CHUNK + j]), load(x + j * N + c), x_i);
      store(x + i * N + c, x_i);
    }
  }
}

// x := (I + tril(t, -1))^-T x
inline void solve_upper(const float* t_CC, float* x, int64_t N) {
  for (int64_t c = 0; c < N; c += LANES) {
    for (int64_t j = CHUNK - 2; j >= 0; --j) {
      Vec x_j = load(x + j * N + c);
      for (int64_t i = CHUNK - 1; i > j; --i) x_j = fnma(set(t_CC[i * CHUNK + j]), load(x + i * N + c), x_j);
      store(x + j * N + c, x_j);
    }
  }
}

// out = tril(t)^T x
inline void transposed_lower_times(const float* t_CC, const float* x, float* out, int64_t N) {
  for (int64_t c = 0; c < N; c += LANES) {
    for (int64_t j = 0; j < CHUNK; ++j) {
      Vec sums = set(0.0f);
      for (int64_t i = j; i < CHUNK; ++i) sums = fma(set(t_CC[i * CHUNK + j]), load(x + i * N + c), sums);
      store(out + j * N + c, sums);
    }
  }
}

// out[c][r] = in[r][c]; both sizes multiples of 16.
inline void transpose(int64_t rows, int64_t columns, const float* in, int64_t ld_in, float* out, int64_t ld_out) {
  for (int64_t r = 0; r < rows; r += LANES) {
    for (int64_t c = 0; c < columns; c += LANES) transpose_block(in + r * ld_in + c, ld_in, out + c * ld_out + r, ld_out);
  }
}

}  // namespace GDN2_ISA
}  // namespace gdn2
