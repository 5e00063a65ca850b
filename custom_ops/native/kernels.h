// What one instruction set offers to core.cpp. step.cpp, chunk.cpp, backward.cpp and table.cpp are compiled once for each
// set, with the set's compiler flags and with GDN2_ISA as the namespace.
//
// Those files keep every function in namespace GDN2_ISA and call no inline function of the standard library: the linker
// keeps one copy of such a function, and it might be the one with AVX-512 code.
#pragma once

#include "core.h"

namespace gdn2 {

constexpr int64_t CHUNK = 16;    // tokens of a chunk of the backward pass
constexpr int64_t COLUMNS = 16;  // splits of V are multiples of it, whatever the vector width
constexpr int64_t PART = 64;     // value columns that one lane of the backward pass owns

// Value heads [begin, end) of N HV, `down`: from the last to the first, and of each the columns [v_begin, v_end), v_begin a
// multiple of COLUMNS.
struct Part {
  int64_t begin, end, v_begin, v_end;
  bool down;
};

struct KernelTable {
  // What returns false had no memory, and its outputs are unfinished.
  void (*step)(const Step&, const Part&);
  // Columns [v_begin, v_end), v_begin a multiple of COLUMNS, of value head hv of sequence n.
  bool (*chunk)(const Chunk&, int64_t n, int64_t hv, int64_t v_begin, int64_t v_end);

  // A lane is (value head of the group, part of V). `partials` null: do all of key head h. Else: write the lane's share of
  // the gradients of q k g b there, chunk after chunk, and leave them to backward_keys.
  bool (*backward_lanes)(const ChunkBackward&, int64_t n, int64_t h, int64_t lane_begin, int64_t lane_end, float* partials);
  bool (*backward_keys)(const ChunkBackward&, int64_t n, int64_t h, int64_t i_chunk, const float* partials);

  void (*exp)(const float* x, float* y, int64_t count);  // for tests
};

namespace portable { extern const KernelTable table; }
namespace avx2 { extern const KernelTable table; }
namespace avx512 { extern const KernelTable table; }

const KernelTable& kernels();
bool is_amd();  // the processor

struct Span {
  int64_t batch, token, length;  // batch index and first token in the views; length of the sequence
};

static inline Span span(const Sequences& in, int64_t n) {
  if (in.cu_seqlens == nullptr) return {n, 0, in.T};
  return {0, in.cu_seqlens[n], in.cu_seqlens[n + 1] - in.cu_seqlens[n]};
}

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Sizes of the backward pass that core.cpp and backward.cpp must agree on.
static inline int64_t lanes_of(const Heads& heads) { return heads.HV / heads.H * ceil_div(heads.V, PART); }
static inline int64_t partial_floats(const Heads& heads) {
  return ceil_div(heads.K, COLUMNS) * COLUMNS * (3 * CHUNK + 1) + 2 * CHUNK * CHUNK;
}

}  // namespace gdn2
