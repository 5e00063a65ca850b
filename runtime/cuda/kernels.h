// The cubins at hand: which one serves a device, how it is loaded, how it is launched.
//
// The table is written by gdn2_ops.export.cubins from the manifest of gdn2_ops.export.kernels. It is compiled into this
// library, or into a file beside it (beside.h). Functions return what went wrong, and nothing when nothing did.
#pragma once

#include <cstdint>
#include <string>

namespace gdn2::cuda {

enum class Kind { pointer, i32, fp32 };

struct Parameter {
  const char* name;
  Kind kind;
};

// Sizes of a call that grids and parameters are made of. slots: chunks of all sequences; length: chunks of a segment.
struct Sizes {
  int64_t N, T, H, HV, P, slots, segments, length, key_size, value_size;
};

struct Image {
  const char* key;  // kernel, dtype, head sizes and options, as `Build.name` spells them
  const char* symbol;
  const unsigned char* cubin;
  const Parameter* parameters;
  int64_t (*grid)(const Image&, const Sizes&);
  int arch;
  bool exact;  // serves this compute capability alone, not later ones of the same major version
  unsigned threads, shared_memory;
  int parameter_count;
  int64_t K, V, BK, BV;  // constexprs, 0 where the kernel has none of that name
};

struct SegmentRow {
  int64_t at_most, at_least, segments;  // programs, chunks
};

constexpr int64_t TABLE_FORMAT = 1;  // another one when a reader of this one would be wrong

struct Table {
  int64_t format;  // first in every format
  const Image* images;
  int64_t image_count;
  const int64_t* head_sizes;  // ascending
  int64_t head_size_count;
  const SegmentRow* segments;
  int64_t segment_count;
  int64_t chunk;  // tokens
  int hidden_parameters;
  uintptr_t pointer_alignment;
  const char* digest;  // of the manifest
};

const Table& table();

// What parameters point to, under the names of the kernels' parameters; a member without a value is null.
struct Values {
  const void *q, *k, *v, *g, *b, *w, *state, *slots, *cu_seqlens;
  void *e, *qd, *kx, *ax, *ax_rest, *a, *decay, *m, *f, *o, *final_state, *states, *r;
  int32_t T, H, HV, N, P, segments, length, key_size, value_size, backward;
  float scale;
  void* hidden;
};

constexpr int MAX_PARAMETERS = 32;

// A kernel in the memory of a device, and how many programs of it a call needs.
struct Launch {
  const Image* image;
  void* function;
  unsigned programs;
  uint16_t offsets[MAX_PARAMETERS];  // of the parameters in Values

  // Asynchronous, and fit for stream capture: no allocation, no synchronisation, no loading.
  std::string start(const Values& values, void* stream) const;
};

// Whether some architecture has a cubin of that key.
bool has_image(const std::string& key);

// Loads the cubin of that key for the device of the current context, once for each context.
std::string load(const std::string& key, const Sizes& sizes, Launch& launch);

}  // namespace gdn2::cuda
