// Chooses the instruction set and cuts each operator into tasks: one for each sequence and head, for a step one for each
// thread, and, when heads are too few for the threads, several for the columns of a value head, which are independent.
#include "core.h"

#include <atomic>
#include <cstdlib>

#include "kernels.h"

namespace gdn2 {
namespace {

bool has(Isa isa) {
#if defined(GDN2_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == Isa::avx2) return avx2;
  if (isa == Isa::avx512) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
#endif
  return isa == Isa::portable;
}

Isa best() { return has(Isa::avx512) ? Isa::avx512 : has(Isa::avx2) ? Isa::avx2 : Isa::portable; }

std::atomic<Isa> chosen{best()};

bool made_by_amd() {
#if defined(GDN2_X86)
  __builtin_cpu_init();
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

// States that are stepped again in place before anything else comes, and are about as large as a cache, are walked up and down
// in turn: the first then are what the last call left in the cache, and not what it pushed out. The turn of a state is found
// by its address; where two share one, nothing is lost but time. Larger states come from memory, whichever way they go.
constexpr int64_t IN_CACHES = 16 << 20;  // bytes

bool takes_turns_down(const Step& args) {
  static std::atomic<bool> turns[256];
  if (args.N * args.heads.HV * args.heads.K * args.heads.V * 4 > IN_CACHES) return false;
  const uint64_t address = reinterpret_cast<uintptr_t>(args.state_out);
  std::atomic<bool>& turn = turns[address * 0x9e3779b97f4a7c15 >> 56];  // by bits from all over the address
  const bool down = !turn.load(std::memory_order_relaxed);
  turn.store(down, std::memory_order_relaxed);
  return down;
}

template <class Body>
void parallel(const ThreadPool& pool, int64_t tasks, Body& body) {
  if (pool.run == nullptr || tasks < 2) {
    for (int64_t i = 0; i < tasks; ++i) body(i);
    return;
  }
  pool.run(pool.context, tasks, [](void* closure, int64_t i) { (*static_cast<Body*>(closure))(i); }, &body);
}

// How many tasks to make of each of `items` equal items, which consist of `units` parts and cost one part more to set up.
int64_t splits(int64_t items, int64_t units, const ThreadPool& pool) {
  const int64_t threads = pool.run == nullptr || pool.threads < 1 ? 1 : pool.threads;
  int64_t best_splits = 1, best_cost = INT64_MAX;
  for (int64_t s = 1; s <= units; ++s) {
    const int64_t cost = ceil_div(items * s, threads) * (ceil_div(units, s) + 1);
    if (cost < best_cost) {
      best_cost = cost;
      best_splits = s;
    }
  }
  return best_splits;
}

// body(item, begin, end) over all items and s parts of [0, units).
template <class Body>
void parallel_parts(const ThreadPool& pool, int64_t items, int64_t units, int64_t s, Body body) {
  auto task = [=](int64_t i) { body(i / s, units * (i % s) / s, units * (i % s + 1) / s); };
  parallel(pool, items * s, task);
}

// Lanes of one key head on several threads: they leave their partials in memory, and a second round adds them, chunk by chunk.
bool backward_in_two_rounds(const ChunkBackward& args, const ThreadPool& pool) {
  const Heads& heads = args.in.heads;
  const int64_t items = args.in.N * heads.H, lanes = lanes_of(heads);
  int64_t chunks = 0;
  for (int64_t n = 0; n < args.in.N; ++n) chunks += ceil_div(span(args.in, n).length, CHUNK);
  const int64_t chunk_floats = lanes * partial_floats(heads);
  const size_t bytes = static_cast<size_t>(chunks * heads.H * chunk_floats) * sizeof(float);
  float* partials = static_cast<float*>(std::malloc(bytes + 1));
  int64_t* at_chunk = static_cast<int64_t*>(std::malloc(static_cast<size_t>(items + 1) * sizeof(int64_t)));
  if (partials == nullptr || at_chunk == nullptr) {
    std::free(at_chunk);
    std::free(partials);
    return false;
  }
  std::atomic<bool> done{true};
  at_chunk[0] = 0;
  for (int64_t i = 0; i < items; ++i) at_chunk[i + 1] = at_chunk[i] + ceil_div(span(args.in, i / heads.H).length, CHUNK);

  parallel_parts(pool, items, lanes, splits(items, lanes, pool), [&](int64_t i, int64_t begin, int64_t end) {
    float* const at = partials + at_chunk[i] * chunk_floats;
    if (!kernels().backward_lanes(args, i / heads.H, i % heads.H, begin, end, at)) done = false;
  });
  auto finish = [&](int64_t task) {
    int64_t i = 0;
    while (at_chunk[i + 1] <= task) ++i;  // few items
    const float* const at = partials + at_chunk[i] * chunk_floats;
    if (!kernels().backward_keys(args, i / heads.H, i % heads.H, task - at_chunk[i], at)) done = false;
  };
  if (done) parallel(pool, at_chunk[items], finish);
  std::free(at_chunk);
  std::free(partials);
  return done;
}

}  // namespace

const KernelTable& kernels() {
#if defined(GDN2_X86)
  const Isa isa = chosen.load(std::memory_order_relaxed);
  if (isa == Isa::avx512) return avx512::table;
  if (isa == Isa::avx2) return avx2::table;
#endif
  return portable::table;
}

Isa isa() { return chosen.load(std::memory_order_relaxed); }

bool is_amd() {
  static const bool amd = made_by_amd();
  return amd;
}

bool set_isa(Isa isa) {
  if (!has(isa)) return false;
  chosen.store(isa, std::memory_order_relaxed);
  return true;
}

// A thread has consecutive value heads, which the kernel takes together.
void step(const Step& args, const ThreadPool& pool) {
  const int64_t items = args.N * args.heads.HV, V = args.heads.V, units = ceil_div(V, COLUMNS);
  const int64_t parts = splits(items, units, pool);
  const auto run = kernels().step;
  if (parts == 1) {
    const int64_t tasks = smaller(items, pool.run == nullptr || pool.threads < 1 ? 1 : pool.threads);
    const bool down = takes_turns_down(args);
    auto task = [&args, run, items, tasks, V, down](int64_t i) {
      run(args, {items * i / tasks, items * (i + 1) / tasks, 0, V, down});
    };
    return parallel(pool, tasks, task);
  }
  parallel_parts(pool, items, units, parts, [&args, run, V](int64_t i, int64_t begin, int64_t end) {
    run(args, {i, i + 1, begin * COLUMNS, smaller(end * COLUMNS, V), false});
  });
}

bool chunk(const Chunk& args, const ThreadPool& pool) {
  const int64_t HV = args.in.heads.HV, V = args.in.heads.V, items = args.in.N * HV, units = ceil_div(V, COLUMNS);
  const auto run = kernels().chunk;
  std::atomic<bool> done{true};
  parallel_parts(pool, items, units, splits(items, units, pool), [&, run, HV, V](int64_t i, int64_t begin, int64_t end) {
    if (!run(args, i / HV, i % HV, begin * COLUMNS, smaller(end * COLUMNS, V))) done = false;
  });
  return done;
}

bool chunk_backward(const ChunkBackward& args, const ThreadPool& pool) {
  const Heads& heads = args.in.heads;
  const int64_t items = args.in.N * heads.H, lanes = lanes_of(heads);
  if (splits(items, lanes, pool) > 1) return backward_in_two_rounds(args, pool);
  const auto run = kernels().backward_lanes;
  std::atomic<bool> done{true};
  auto task = [&, run, lanes](int64_t i) {
    if (!run(args, i / heads.H, i % heads.H, 0, lanes, nullptr)) done = false;
  };
  parallel(pool, items, task);
  return done;
}

}  // namespace gdn2
