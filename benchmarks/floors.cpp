// What this machine can do at most, measured: multiply-adds on registers, and a state scaled in place.
//
//   seconds_of_fma(elements, threads)            multiply-adds on that many float elements, nothing loaded or stored
//   seconds_of_scale(x, n, passes, threads)      one pass of x *= 1 over n floats, each thread over its own part
//
// Both return the time of the slowest thread between a barrier and its end: starting threads is not in it.
#include <algorithm>
#include <chrono>
#include <cstdint>

#include <omp.h>

namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif
constexpr int LANES = BYTES / 4;
constexpr int CHAINS = 12;  // latency 4, two a cycle: 8 would do; with two constants 16 registers hold them
typedef float Vector __attribute__((vector_size(BYTES), aligned(4)));

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

template <class Body>
double slowest(int threads, const Body& body) {
  double worst = 0;
#pragma omp parallel num_threads(threads) reduction(max : worst)
  {
    const int i = omp_get_thread_num();
#pragma omp barrier
    const double start = now();
    body(i);
    worst = now() - start;
  }
  return worst;
}

}  // namespace

extern "C" double seconds_of_fma(int64_t elements, int threads) {
  const int64_t rounds = std::max<int64_t>(1, elements / threads / (CHAINS * LANES));
  const double seconds = slowest(threads, [&](int i) {
    Vector sums[CHAINS], factor, term;
    for (int lane = 0; lane < LANES; ++lane) factor[lane] = 0.5f + 0.001f * i, term[lane] = 0.25f;
    for (Vector& sum : sums) sum = term;
    for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 12
      for (int c = 0; c < CHAINS; ++c) sums[c] = sums[c] * factor + term;
    }
    float total = 0;
    for (const Vector& sum : sums) total += sum[0];
    asm volatile("" ::"x"(total));
  });
  return seconds * static_cast<double>(elements) / (static_cast<double>(rounds) * threads * CHAINS * LANES);
}

extern "C" double seconds_of_scale(float* x, int64_t n, int64_t passes, int threads) {
  volatile float one = 1.0f;  // a constant that the compiler does not see; the values stay
  const float factor = one;
  const int64_t vectors = n / LANES;
  const double seconds = slowest(threads, [&](int i) {
    float* const begin = x + vectors * i / threads * LANES;
    float* const end = x + vectors * (i + 1) / threads * LANES;
    for (int64_t pass = 0; pass < passes; ++pass) {
      for (float* at = begin; at < end; at += LANES) *reinterpret_cast<Vector*>(at) *= factor;
      asm volatile("" ::: "memory");
    }
  });
  return seconds / static_cast<double>(passes);
}
