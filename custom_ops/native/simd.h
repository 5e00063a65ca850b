// One vector of fp32 lanes for each instruction set, and the conversions from and to the three tensor types.
// The kernels above it are written once. The set is the one the compiler flags name; the portable one needs the vector
// extensions of gcc or clang and nothing of the processor.
//
// exp: x = n ln2 + r, |r| <= ln2/2, degree-7 polynomial (Cephes) times 2^n; within 2 ulp, gradual underflow, NaN stays NaN.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernels.h"

#define GDN2_INLINE inline __attribute__((always_inline))

namespace gdn2 {
namespace GDN2_ISA {

constexpr int64_t CACHE_LINE = 64;  // bytes

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

#if defined(__AVX512F__)

constexpr int LANES = 16;
constexpr int CHUNK_VECS = 2;    // 8 sums and 4 values for each, of 32 registers
constexpr int STEP_VECS = 4;     // 2 sums for each
constexpr int64_t STEP_FAR = 3 << 19;  // bytes of states that one thread walks: beyond, rows of 128 columns are faster
constexpr int64_t STEP_FAR_AMD = 0;    // ... and on AMD's processors
constexpr int PRODUCT_ROWS = 8;  // rows x 2 vectors of sums in a matrix product

struct Vec { __m512 x; };

GDN2_INLINE Vec set(float x) { return {_mm512_set1_ps(x)}; }
GDN2_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.x, b.x)}; }
GDN2_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.x, b.x)}; }
GDN2_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.x, b.x)}; }
GDN2_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.x, b.x, c.x)}; }
GDN2_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.x, b.x, c.x)}; }
GDN2_INLINE float sum(Vec a) { return _mm512_reduce_add_ps(a.x); }
// The second operand of min and max is the one that survives a NaN.
GDN2_INLINE Vec clamp(Vec x, float low, float high) { return {_mm512_min_ps(set(high).x, _mm512_max_ps(set(low).x, x.x))}; }
GDN2_INLINE Vec times_power_of_2(Vec a, Vec n) { return {_mm512_scalef_ps(a.x, n.x)}; }

// Keeps a loaded vector in a register: gcc repeats the load for each use of it, and a load costs as much as an fma.
GDN2_INLINE Vec once(Vec a) {
  __asm__("" : "+v"(a.x));
  return a;
}

GDN2_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
GDN2_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.x); }

// The first n lanes, for a load (reads) or store (writes) at p. To gcc's sanitizers a masked access is none: they see these.
GDN2_INLINE __mmask16 mask(int64_t n) { return n >= LANES ? 0xffff : static_cast<__mmask16>((1u << n) - 1); }
template <class T>
GDN2_INLINE __mmask16 reads(const T* p, int64_t n) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  const volatile char* bytes = reinterpret_cast<const volatile char*>(p);
  for (size_t i = 0; i < static_cast<size_t>(n < LANES ? n : LANES) * sizeof(T); ++i) (void)bytes[i];
#endif
  (void)p;
  return mask(n);
}
template <class T>
GDN2_INLINE __mmask16 writes(T* p, int64_t n) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  volatile char* bytes = reinterpret_cast<volatile char*>(p);
  for (size_t i = 0; i < static_cast<size_t>(n < LANES ? n : LANES) * sizeof(T); ++i) bytes[i] = 0;
#endif
  (void)p;
  return mask(n);
}
GDN2_INLINE Vec load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(reads(p, n), p)}; }
GDN2_INLINE void store(float* p, Vec a, int64_t n) { _mm512_mask_storeu_ps(p, writes(p, n), a.x); }

GDN2_INLINE Vec load(const Float16* p, int64_t n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(reads(p, n), p))}; }
GDN2_INLINE void store(Float16* p, Vec a, int64_t n) {
  _mm256_mask_storeu_epi16(p, writes(p, n), _mm512_cvtps_ph(a.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
GDN2_INLINE Vec load(const BFloat16* p, int64_t n) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(reads(p, n), p)), 16))};
}
GDN2_INLINE void store(BFloat16* p, Vec a, int64_t n) {
  const __m512i bits = _mm512_castps_si512(a.x), one = _mm512_set1_epi32(1);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x00400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.x, a.x, _CMP_UNORD_Q);
  const __m512i top = _mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16);
  _mm256_mask_storeu_epi16(p, writes(p, n), _mm512_cvtepi32_epi16(top));
}

// out[c][r] = in[r][c] for a LANES x LANES block.
GDN2_INLINE void transpose_block(const float* in, int64_t ld_in, float* out, int64_t ld_out) {
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(in + i * ld_in);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // a[4 r + i]: columns i, i + 4, i + 8, i + 12 of rows 4 r to 4 r + 3
    b[i] = _mm512_shuffle_f32x4(a[i], a[4 + i], 0x88);
    b[4 + i] = _mm512_shuffle_f32x4(a[i], a[4 + i], 0xdd);
    b[8 + i] = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0x88);
    b[12 + i] = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_ps(out + i * ld_out, _mm512_shuffle_f32x4(b[i], b[8 + i], 0x88));
    _mm512_storeu_ps(out + (8 + i) * ld_out, _mm512_shuffle_f32x4(b[i], b[8 + i], 0xdd));
    _mm512_storeu_ps(out + (4 + i) * ld_out, _mm512_shuffle_f32x4(b[4 + i], b[12 + i], 0x88));
    _mm512_storeu_ps(out + (12 + i) * ld_out, _mm512_shuffle_f32x4(b[4 + i], b[12 + i], 0xdd));
  }
}

#else  // full vectors below; a part of one goes through a buffer

#if defined(__AVX2__)

constexpr int LANES = 8;
constexpr int CHUNK_VECS = 1;
constexpr int STEP_VECS = 4;
constexpr int64_t STEP_FAR = 6 << 20, STEP_FAR_AMD = STEP_FAR;
constexpr int PRODUCT_ROWS = 4;

struct Vec { __m256 x; };

GDN2_INLINE Vec set(float x) { return {_mm256_set1_ps(x)}; }
GDN2_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.x, b.x)}; }
GDN2_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.x, b.x)}; }
GDN2_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.x, b.x)}; }
GDN2_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.x, b.x, c.x)}; }
GDN2_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_ps(a.x, b.x, c.x)}; }
GDN2_INLINE float sum(Vec a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a.x), _mm256_extractf128_ps(a.x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
GDN2_INLINE Vec clamp(Vec x, float low, float high) { return {_mm256_min_ps(set(high).x, _mm256_max_ps(set(low).x, x.x))}; }
// Two factors: 2^n itself may be no normal number while the result is one.
GDN2_INLINE Vec times_power_of_2(Vec a, Vec n) {
  const __m256i i = _mm256_cvtps_epi32(n.x), bias = _mm256_set1_epi32(127);
  const __m256i i1 = _mm256_srai_epi32(i, 1), i2 = _mm256_sub_epi32(i, i1);
  const __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(i1, bias), 23));
  const __m256 second = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(i2, bias), 23));
  return {_mm256_mul_ps(_mm256_mul_ps(a.x, first), second)};
}

GDN2_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
GDN2_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.x); }
GDN2_INLINE __m128i load_8x16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
GDN2_INLINE Vec load(const Float16* p) { return {_mm256_cvtph_ps(load_8x16(p))}; }
GDN2_INLINE void store(Float16* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
GDN2_INLINE Vec load(const BFloat16* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_8x16(p)), 16))};
}
GDN2_INLINE void store(BFloat16* p, Vec a) {
  const __m256i bits = _mm256_castps_si256(a.x), one = _mm256_set1_epi32(1);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.x, a.x, _CMP_UNORD_Q));
  const __m256i top = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1)));
}

GDN2_INLINE void transpose_block(const float* in, int64_t ld_in, float* out, int64_t ld_out) {
  __m256 a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(in + i * ld_in);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(out + i * ld_out, _mm256_permute2f128_ps(a[i], a[4 + i], 0x20));
    _mm256_storeu_ps(out + (4 + i) * ld_out, _mm256_permute2f128_ps(a[i], a[4 + i], 0x31));
  }
}

#else  // portable

constexpr int LANES = 4;
constexpr int CHUNK_VECS = 1;
constexpr int STEP_VECS = 4;
constexpr int64_t STEP_FAR = 6 << 20, STEP_FAR_AMD = STEP_FAR;
constexpr int PRODUCT_ROWS = 4;

typedef float Four __attribute__((vector_size(16)));
struct Vec { Four x; };

GDN2_INLINE Vec set(float x) { return {Four{x, x, x, x}}; }
GDN2_INLINE Vec operator+(Vec a, Vec b) { return {a.x + b.x}; }
GDN2_INLINE Vec operator-(Vec a, Vec b) { return {a.x - b.x}; }
GDN2_INLINE Vec operator*(Vec a, Vec b) { return {a.x * b.x}; }
GDN2_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.x * b.x + c.x}; }
GDN2_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {c.x - a.x * b.x}; }
GDN2_INLINE float sum(Vec a) { return (a.x[0] + a.x[2]) + (a.x[1] + a.x[3]); }
GDN2_INLINE float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
GDN2_INLINE uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
GDN2_INLINE Vec clamp(Vec x, float low, float high) {
  for (int i = 0; i < LANES; ++i) x.x[i] = x.x[i] < low ? low : x.x[i] > high ? high : x.x[i];
  return x;
}
GDN2_INLINE Vec times_power_of_2(Vec a, Vec n) {
  for (int i = 0; i < LANES; ++i) {
    const int power = n.x[i] == n.x[i] ? static_cast<int>(n.x[i]) : 0, first = power >> 1;
    a.x[i] = a.x[i] * as_float((first + 127u) << 23) * as_float((power - first + 127u) << 23);
  }
  return a;
}

GDN2_INLINE float to_float(BFloat16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }
GDN2_INLINE float to_float(Float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = (x.bits & 0x7fffu) << 13;
  if ((x.bits & 0x7c00u) == 0x7c00u) return as_float(sign | 0x7f800000u | rest);
  return as_float(sign | as_bits(as_float(rest) * 0x1p112f));  // the product is exact, subnormals too
}
GDN2_INLINE void from_float(BFloat16* out, float x) {
  const uint32_t bits = as_bits(x);
  out->bits = static_cast<uint16_t>((x != x ? bits | 0x00400000u : bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
GDN2_INLINE void from_float(Float16* out, float x) {
  const uint32_t bits = as_bits(x), sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
  uint32_t half;
  if (size > 0x7f800000u) half = 0x7e00u | ((size >> 13) & 0x3ffu);
  else if (size >= 0x477ff000u) half = 0x7c00u;  // 65520 and up round to infinity
  else if (size < 0x38800000u) half = as_bits(as_float(size) + 0.5f) - 0x3f000000u;  // 0.5 has the ulp of fp16 subnormals
  else half = (size + 0xfffu + ((size >> 13) & 1u) - (112u << 23)) >> 13;
  out->bits = static_cast<uint16_t>(sign | half);
}

GDN2_INLINE Vec load(const float* p) {
  Vec a;
  std::memcpy(&a, p, sizeof(a));
  return a;
}
GDN2_INLINE void store(float* p, Vec a) { std::memcpy(p, &a, sizeof(a)); }
template <class T>
GDN2_INLINE Vec load(const T* p) {
  return {Four{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
}
template <class T>
GDN2_INLINE void store(T* p, Vec a) {
  for (int i = 0; i < LANES; ++i) from_float(p + i, a.x[i]);
}

GDN2_INLINE void transpose_block(const float* in, int64_t ld_in, float* out, int64_t ld_out) {
  for (int c = 0; c < LANES; ++c) {
    for (int r = 0; r < LANES; ++r) out[c * ld_out + r] = in[r * ld_in + c];
  }
}

#endif

GDN2_INLINE Vec once(Vec a) {
#if defined(__AVX2__)
  __asm__("" : "+x"(a.x));
#endif
  return a;
}

template <class T>
GDN2_INLINE Vec load(const T* p, int64_t n) {
  if (n >= LANES) return load(p);
  T part[LANES] = {};
  std::memcpy(part, p, static_cast<size_t>(n) * sizeof(T));
  return load(part);
}
template <class T>
GDN2_INLINE void store(T* p, Vec a, int64_t n) {
  if (n >= LANES) return store(p, a);
  T part[LANES];
  store(part, a);
  std::memcpy(p, part, static_cast<size_t>(n) * sizeof(T));
}

#endif

GDN2_INLINE Vec exp(Vec x) {
  x = clamp(x, -104.0f, 89.0f);  // exp rounds to 0 and to infinity there
  const Vec magic = set(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec n = fma(x, set(1.44269504088896341f), magic) - magic;
  const Vec r = fnma(n, set(-2.12194440e-4f), fnma(n, set(0.693359375f), x));
  Vec p = fma(set(1.9875691500e-4f), r, set(1.3981999507e-3f));
  p = fma(p, r, set(8.3334519073e-3f));
  p = fma(p, r, set(4.1665795894e-2f));
  p = fma(p, r, set(1.6666665459e-1f));
  p = fma(p, r, set(5.0000001201e-1f));
  p = fma(p, r * r, r) + set(1.0f);
  return times_power_of_2(p, n);
}

// 64-byte aligned memory of one task; data is null where there is none left.
struct Scratch {
  explicit Scratch(int64_t floats)
      : data(static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>((floats + 15) / 16 * 64)))) {}
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* data;
};

template <class T>
GDN2_INLINE const T* row(const View& view, int64_t batch, int64_t token, int64_t at) {
  return static_cast<const T*>(view.data) + batch * view.batch + token * view.token + at;
}

}  // namespace GDN2_ISA
}  // namespace gdn2
