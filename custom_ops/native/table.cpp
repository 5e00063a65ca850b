// The kernels of one instruction set, as core.cpp sees them.
#include "simd.h"

namespace gdn2 {
namespace GDN2_ISA {

void step(const Step&, const Part&);
bool chunk(const Chunk&, int64_t n, int64_t hv, int64_t v_begin, int64_t v_end);
bool backward_lanes(const ChunkBackward&, int64_t n, int64_t h, int64_t lane_begin, int64_t lane_end, float* partials);
bool backward_keys(const ChunkBackward&, int64_t n, int64_t h, int64_t i_chunk, const float* partials);

static void exp_row(const float* x, float* y, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES) store(y + i, exp(load(x + i, count - i)), count - i);
}

extern const KernelTable table;
const KernelTable table = {step, chunk, backward_lanes, backward_keys, exp_row};

}  // namespace GDN2_ISA
}  // namespace gdn2
