#include "operators.h"

#include <algorithm>
#include <tuple>

namespace gdn2::cuda {
namespace {

constexpr size_t ALIGNMENT = 256;  // of the workspace's parts

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t largest_head() { return table().head_sizes[table().head_size_count - 1]; }

int64_t head_size(int64_t size) {
  return *std::lower_bound(table().head_sizes, table().head_sizes + table().head_size_count, size);
}

const char* name(Type type) { return type == Type::f32 ? "fp32" : type == Type::bf16 ? "bf16" : "fp16"; }

size_t bytes(Type type) { return type == Type::f32 ? 4 : 2; }

// The key of an image: options but `masked` are spelled out by the caller, in the manifest's order.
std::string key(const char* kernel, const Problem& problem, int64_t V, const std::string& options) {
  return std::string(kernel) + "-" + name(problem.type) + "-k" + std::to_string(head_size(problem.K)) + "-v" +
         std::to_string(head_size(V)) + options;
}

bool is_masked(int64_t K, int64_t V) { return head_size(K) != K || head_size(V) != V; }

std::string masked(int64_t K, int64_t V) { return is_masked(K, V) ? "-masked1" : "-masked0"; }

// MASKED of `prepare`, which sees no values, is of the keys alone.
struct Keys {
  std::string step, prepare, recur, summarise, chain;

  explicit Keys(const Problem& p)
      : step(key("step", p, p.V, "-slots0" + masked(p.K, p.V))),
        prepare(key("prepare", p, p.K, "-packed0" + masked(p.K, p.K))),
        recur(key(is_masked(p.K, p.V) ? "recur_masked" : "recur", p, p.V,
                  "-state1-packed0-backward0" + masked(p.K, p.V))),
        summarise(key("summarise", p, p.V, "-packed0" + masked(p.K, p.V))),
        chain(key("chain", p, p.V,
                  "-state1-packed0" + masked(p.K, p.V) + (p.type == Type::f32 ? "-exact1" : "-exact0"))) {}
};

std::string check_sizes(const Problem& p) {
  if (p.H < 1 || p.HV < 1 || p.HV % p.H != 0) {
    return "expected HV to be a positive multiple of H = " + std::to_string(p.H) + ", got " + std::to_string(p.HV);
  }
  if (p.K < 1 || p.V < 1 || p.K > largest_head() || p.V > largest_head()) {
    return "expected head sizes K and V in 1.." + std::to_string(largest_head()) + ", got " + std::to_string(p.K) +
           " and " + std::to_string(p.V);
  }
  if (p.B < 0 || p.T < 0 || std::max(p.B, p.T) > INT32_MAX || p.HV > INT32_MAX) {
    return "expected B, T and HV in 0..2**31 - 1, got " + std::to_string(p.B) + ", " + std::to_string(p.T) + " and " +
           std::to_string(p.HV);
  }
  return {};
}

// The rule of gdn2_ops/kernels/chunk_forward.py: programs count value tiles of 64 channels, whatever BV is.
constexpr int64_t PROGRAM_CHANNELS = 64;

int64_t programs(const Problem& p) { return p.B * p.HV * ceil_div(p.V, PROGRAM_CHANNELS); }

int64_t segments(const Problem& p, int64_t chunks) {
  for (int64_t i = 0; i < table().segment_count; ++i) {
    const SegmentRow& row = table().segments[i];
    if (programs(p) <= row.at_most && chunks >= row.at_least) return row.segments;
  }
  return 1;
}

size_t place(size_t& end, size_t bytes) {
  const size_t at = end;
  end += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  return at;
}

Workspace lay_out(const Problem& p, int64_t slots, int64_t segments) {
  Workspace at = {};
  const size_t C = table().chunk, rows = slots * p.H, K = head_size(p.K), states = p.B * segments * p.HV * p.K * p.V;
  at.e = place(at.end, rows * C * K * bytes(p.type));
  at.qd = place(at.end, rows * C * K * bytes(p.type));
  at.kx = place(at.end, rows * C * K * bytes(p.type));
  at.ax = place(at.end, rows * (C * (C + 16) / 2) * bytes(p.type));  // triangle_size of products.py
  at.decay = place(at.end, rows * K * sizeof(float));
  if (segments > 1) {
    at.m = place(at.end, p.B * segments * p.H * p.K * p.K * sizeof(float));
    at.f = place(at.end, states * sizeof(float));
  }
  return at;
}

}  // namespace

bool Problem::operator==(const Problem& other) const {
  const auto all = [](const Problem& p) { return std::tie(p.B, p.T, p.H, p.HV, p.K, p.V, p.type); };
  return all(*this) == all(other);
}

std::string check(const Problem& p) {
  std::string wrong = check_sizes(p);
  if (!wrong.empty()) return wrong;
  const Keys keys(p);
  for (const std::string& one : {keys.step, keys.prepare, keys.recur, keys.summarise, keys.chain}) {
    if (!has_image(one)) {
      return "expected head sizes and a type that this library was built for, got " + one + ", which it does not hold; "
             "build it with them: gdn2 build-plugin";
    }
  }
  return {};
}

size_t workspace_bytes(const Problem& largest) {
  if (largest.T <= 1) return 0;
  const int64_t chunks = ceil_div(largest.T, table().chunk);
  size_t most = lay_out(largest, largest.B * chunks, 1).end;
  // Fewer sequences than the most may walk in segments where more do not: the most sequences of every row.
  for (int64_t i = 0; i < table().segment_count; ++i) {
    const SegmentRow& row = table().segments[i];
    Problem p = largest;
    p.B = std::min(largest.B, row.at_most / std::max<int64_t>(1, largest.HV * ceil_div(largest.V, PROGRAM_CHANNELS)));
    if (p.B > 0 && chunks >= row.at_least) most = std::max(most, lay_out(p, p.B * chunks, row.segments).end);
  }
  return most;
}

std::string Operator::add(const std::string& key, bool in_segments) {
  in_segments_[count_] = in_segments;
  return cuda::load(key, sizes_, launches_[count_++]);
}

std::string Operator::load(const Problem& p) {
  count_ = 0;
  std::string failed = check(p);
  if (!failed.empty()) return failed;
  const Keys keys(p);
  const int64_t chunks = ceil_div(p.T, table().chunk), parts = p.T == 1 ? 1 : segments(p, chunks);
  const bool split = parts > 1;
  sizes_ = {p.B, p.T, p.H, p.HV, p.B, p.B * chunks, parts, ceil_div(chunks, parts), p.K, p.V};
  at_ = lay_out(p, p.T == 1 ? 0 : sizes_.slots, parts);
  if (p.T == 1) {
    failed = add(keys.step);
  } else {
    failed = add(keys.prepare);
    if (failed.empty() && split) failed = add(keys.summarise);
    if (failed.empty() && split) failed = add(keys.chain);
    if (failed.empty()) failed = add(keys.recur, split);
  }
  if (!failed.empty()) count_ = 0;
  return failed;
}

std::string Operator::run(const Tensors& x, float scale, void* workspace, void* stream) const {
  if (count_ == 0) return "expected kernels that load() has chosen, got none";
  uintptr_t bits = at_.end == 0 ? 0 : reinterpret_cast<uintptr_t>(workspace);
  for (const void* pointer : {x.q, x.k, x.v, x.g, x.b, x.w, x.state, static_cast<const void*>(x.o),
                              static_cast<const void*>(x.final_state)}) {
    bits |= reinterpret_cast<uintptr_t>(pointer);
  }
  if (bits % table().pointer_alignment != 0) {
    return "expected tensors at multiples of " + std::to_string(table().pointer_alignment) + " bytes, got others";
  }
  char* const base = static_cast<char*>(workspace);
  Values values = {};
  values.q = x.q, values.k = x.k, values.v = x.v, values.g = x.g, values.b = x.b, values.w = x.w;
  values.e = base + at_.e, values.qd = base + at_.qd, values.kx = base + at_.kx, values.ax = base + at_.ax;
  values.decay = base + at_.decay;
  values.m = base + at_.m, values.f = base + at_.f;
  values.o = x.o, values.final_state = x.final_state;
  const auto narrow = [](int64_t size) { return static_cast<int32_t>(size); };
  values.T = narrow(sizes_.T), values.H = narrow(sizes_.H), values.HV = narrow(sizes_.HV), values.N = narrow(sizes_.N);
  values.P = narrow(sizes_.P), values.segments = narrow(sizes_.segments), values.length = narrow(sizes_.length);
  values.key_size = narrow(sizes_.key_size), values.value_size = narrow(sizes_.value_size);
  values.scale = scale;
  for (int i = 0; i < count_; ++i) {
    values.state = in_segments_[i] ? values.f : x.state;
    std::string failed = launches_[i].start(values, stream);
    if (!failed.empty()) return failed;
  }
  return {};
}

}  // namespace gdn2::cuda
