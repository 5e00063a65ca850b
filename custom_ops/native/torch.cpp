// The operators of gdn2 for torch on the CPU: schemas and kernels through the LibTorch stable ABI, so that one binary
// serves every torch from 2.11 on, in Python and in a C++ process that runs an exported program.
//
// What is checked here is what keeps the kernels inside their memory. Python callers read of a refusal in the words of
// custom_ops/contract.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "core.h"
#include "kernels.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

[[noreturn]] void refuse(const char* op, const std::string& expected, const std::string& got) {
  STD_TORCH_CHECK(false, "gdn2::", op, ": expected ", expected, ", got ", got);
}

std::string text(Sizes values) {
  std::string list;
  for (size_t i = 0; i < values.size() && i < 12; ++i) list += (i ? ", " : "") + std::to_string(values[i]);
  return "[" + list + (values.size() > 12 ? ", ...]" : "]");
}

std::string text(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    default: return "another dtype";
  }
}

void expect(const char* op, const char* name, const Tensor& x, Sizes shape, ScalarType type) {
  if (!x.is_cpu()) refuse(op, name + std::string(" on cpu"), "another device");
  if (x.scalar_type() != type) refuse(op, std::string(name) + " of dtype " + text(type), text(x.scalar_type()));
  const Sizes got = x.sizes();
  if (!std::equal(got.begin(), got.end(), shape.begin(), shape.end())) {
    refuse(op, std::string(name) + " of shape " + text(shape), text(got));
  }
}

gdn2::Type type_of(const char* op, const Tensor& q) {
  switch (q.scalar_type()) {
    case ScalarType::Float: return gdn2::Type::f32;
    case ScalarType::BFloat16: return gdn2::Type::bf16;
    case ScalarType::Half: return gdn2::Type::f16;
    default: refuse(op, "q of dtype float32, bfloat16 or float16", text(q.scalar_type()));
  }
}

// [.., heads, channels] with the last two axes contiguous, copied when they are not.
Tensor packed_heads(const Tensor& x) {
  const int64_t rank = x.dim(), heads = x.size(rank - 2), channels = x.size(rank - 1);
  const bool packed = (channels == 1 || x.stride(rank - 1) == 1) && (heads == 1 || x.stride(rank - 2) == channels);
  return packed ? x : torch::stable::contiguous(x);
}

Tensor packed(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

struct Inputs {
  const char* op;
  Tensor q, k, v, g, b, w;
  gdn2::Heads heads;
  gdn2::Type type;

  Inputs(const char* op, int rank, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& b,
         const Tensor& w)
      : op(op), q(q), k(k), v(v), g(g), b(b), w(w), heads{}, type(type_of(op, q)) {
    if (q.dim() != rank) refuse(op, "q of rank " + std::to_string(rank), text(q.sizes()));
    if (v.dim() != rank) refuse(op, "v of rank " + std::to_string(rank), text(v.sizes()));
    const Sizes keys = q.sizes();
    int64_t like_v[4];  // the batch and tokens of q, the heads and channels of v
    std::copy_n(keys.begin(), rank - 2, like_v);
    std::copy_n(v.sizes().end() - 2, 2, like_v + rank - 2);
    const Sizes values(like_v, rank);
    const ScalarType type_of_q = q.scalar_type();
    expect(op, "q", q, keys, type_of_q);
    expect(op, "k", k, keys, type_of_q);
    expect(op, "b", b, keys, type_of_q);
    expect(op, "g", g, keys, ScalarType::Float);
    expect(op, "v", v, values, type_of_q);
    expect(op, "w", w, values, type_of_q);
    heads = {q.size(rank - 2), v.size(rank - 2), q.size(rank - 1), v.size(rank - 1)};
    if (heads.H < 1 || heads.HV < 1 || heads.HV % heads.H != 0) {
      refuse(op, "HV to be a positive multiple of H = " + std::to_string(heads.H), std::to_string(heads.HV));
    }
    if (std::min(heads.K, heads.V) < 1 || std::max(heads.K, heads.V) > gdn2::MAX_HEAD) {
      refuse(op, "head sizes K and V in 1..256", std::to_string(heads.K) + " and " + std::to_string(heads.V));
    }
    for (Tensor* x : {&this->q, &this->k, &this->v, &this->g, &this->b, &this->w}) *x = packed_heads(*x);
  }

  std::array<int64_t, 4> state_shape(int64_t states) const { return {states, heads.HV, heads.K, heads.V}; }
};

gdn2::View view(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.dim() == 4 ? x.stride(1) : 0}; }

#if defined(__SANITIZE_THREAD__)
// The thread sanitizer does not see how OpenMP's threads wait for each other; it sees how these do. One thread each task.
void run_in_torch(void*, int64_t tasks, void (*body)(void*, int64_t), void* closure) {
  std::vector<std::thread> running;
  for (int64_t i = 0; i < tasks; ++i) running.emplace_back(body, closure, i);
  for (std::thread& thread : running) thread.join();
}
#else
void run_in_torch(void*, int64_t tasks, void (*body)(void*, int64_t), void* closure) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(closure, i);
  });
}
#endif

gdn2::ThreadPool threads() {
  return {run_in_torch, nullptr, static_cast<int>(torch::stable::get_num_threads())};
}

std::vector<int64_t> indices(const char* op, const char* name, const Tensor& x) {
  if (!x.is_cpu() || x.dim() != 1) refuse(op, std::string(name) + " to be a vector on cpu", text(x.sizes()));
  const Tensor source = packed(x);
  std::vector<int64_t> values(source.numel());
  if (x.scalar_type() == ScalarType::Long) {
    std::copy_n(source.const_data_ptr<int64_t>(), values.size(), values.begin());
  } else if (x.scalar_type() == ScalarType::Int) {
    std::copy_n(source.const_data_ptr<int32_t>(), values.size(), values.begin());
  } else {
    refuse(op, std::string(name) + " of dtype int32 or int64", text(x.scalar_type()));
  }
  return values;
}

struct Sequences {
  Inputs in;
  std::optional<Tensor> state;
  std::vector<int64_t> bounds;
  int64_t N;
  float scale;

  Sequences(Inputs inputs, const std::optional<Tensor>& state, const std::optional<Tensor>& cu_seqlens, double scale)
      : in(std::move(inputs)), N(in.q.size(0)), scale(static_cast<float>(scale)) {
    if (cu_seqlens) {
      bounds = indices(in.op, "cu_seqlens", *cu_seqlens);
      const int64_t T = in.q.size(1);
      if (in.q.size(0) != 1) refuse(in.op, "batch 1 with cu_seqlens", std::to_string(in.q.size(0)));
      const bool whole = bounds.size() > 1 && bounds.front() == 0 && bounds.back() == T;
      if (!whole || !std::is_sorted(bounds.begin(), bounds.end())) {
        refuse(in.op, "cu_seqlens to start at 0, never fall and end at T = " + std::to_string(T), text(bounds));
      }
      N = static_cast<int64_t>(bounds.size()) - 1;
    }
    if (state) {
      expect(in.op, "state", *state, in.state_shape(N), ScalarType::Float);
      this->state = packed(*state);
    }
  }

  gdn2::Sequences core() const {
    return {in.heads,   N,          in.q.size(1), bounds.empty() ? nullptr : bounds.data(),
            in.type,    scale,      view(in.q),   view(in.k),
            view(in.v), view(in.g), view(in.b),   view(in.w),
            state ? state->const_data_ptr<float>() : nullptr};
  }
};

// A contiguous tensor with the dtype of x. torch::stable::new_empty would look its operator up by name at every call.
Tensor new_tensor(const Tensor& x, Sizes shape) {
  AtenTensorHandle created = nullptr;
  const int64_t rank = static_cast<int64_t>(shape.size());
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_aten_new_empty(x.get(), shape.data(), rank, nullptr, nullptr, nullptr, 0, nullptr, &created));
  return Tensor(created);
}

Tensor like(const Tensor& x) { return new_tensor(x, x.sizes()); }

Tensor new_state(const Inputs& in, int64_t states) { return new_tensor(in.g, in.state_shape(states)); }

std::tuple<Tensor, Tensor> chunk(const Tensor q, const Tensor k, const Tensor v, const Tensor g, const Tensor b,
                                 const Tensor w, const std::optional<Tensor> state,
                                 const std::optional<Tensor> cu_seqlens, double scale) {
  const Sequences in(Inputs("chunk", 4, q, k, v, g, b, w), state, cu_seqlens, scale);
  Tensor o = like(v), final_state = new_state(in.in, in.N);
  const bool done = gdn2::chunk({in.core(), o.mutable_data_ptr(), final_state.mutable_data_ptr<float>()}, threads());
  if (!done) refuse("chunk", "memory for its scratch", "none");
  return {o, final_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> chunk_backward(
    const Tensor do_, const std::optional<Tensor> dfinal_state, const Tensor q, const Tensor k, const Tensor v,
    const Tensor g, const Tensor b, const Tensor w, const std::optional<Tensor> state,
    const std::optional<Tensor> cu_seqlens, double scale) {
  const Sequences in(Inputs("chunk_backward", 4, q, k, v, g, b, w), state, cu_seqlens, scale);
  expect("chunk_backward", "do", do_, v.sizes(), v.scalar_type());
  const Tensor do_packed = packed_heads(do_);
  std::optional<Tensor> dfinal;
  if (dfinal_state) {
    expect("chunk_backward", "dfinal_state", *dfinal_state, in.in.state_shape(in.N), ScalarType::Float);
    dfinal = packed(*dfinal_state);
  }
  Tensor dq = like(q), dk = like(k), dv = like(v), dg = like(g), db = like(b), dw = like(w);
  Tensor dstate = new_state(in.in, in.N);
  const bool done = gdn2::chunk_backward(
      {in.core(), view(do_packed), dfinal ? dfinal->const_data_ptr<float>() : nullptr, dq.mutable_data_ptr(),
       dk.mutable_data_ptr(), dv.mutable_data_ptr(), dg.mutable_data_ptr<float>(), db.mutable_data_ptr(),
       dw.mutable_data_ptr(), dstate.mutable_data_ptr<float>()},
      threads());
  if (!done) refuse("chunk_backward", "memory for its scratch", "none");
  return {dq, dk, dv, dg, db, dw, dstate};
}

std::tuple<Tensor, Tensor> step(const Tensor q, const Tensor k, const Tensor v, const Tensor g, const Tensor b,
                                const Tensor w, const Tensor state, double scale) {
  const Inputs in("step", 3, q, k, v, g, b, w);
  const int64_t N = q.size(0);
  expect("step", "state", state, in.state_shape(N), ScalarType::Float);
  const Tensor before = packed(state);
  Tensor o = like(v), after = new_state(in, N);
  gdn2::step({in.heads, N, in.type, static_cast<float>(scale), view(in.q), view(in.k), view(in.v), view(in.g),
              view(in.b), view(in.w), before.const_data_ptr<float>(), after.mutable_data_ptr<float>(), nullptr, 0,
              o.mutable_data_ptr()},
             threads());
  return {o, after};
}

Tensor step_inplace(const Tensor q, const Tensor k, const Tensor v, const Tensor g, const Tensor b, const Tensor w,
                    Tensor state, const std::optional<Tensor> slots, double scale) {
  const Inputs in("step_inplace", 3, q, k, v, g, b, w);
  const int64_t N = q.size(0), pool = slots && state.dim() > 0 ? state.size(0) : N;
  expect("step_inplace", "state", state, in.state_shape(pool), ScalarType::Float);
  if (!state.is_contiguous()) refuse("step_inplace", "a contiguous state", "strides");
  std::vector<int64_t> rows;
  if (slots) {
    rows = indices("step_inplace", "slots", *slots);
    std::vector<int64_t> sorted = rows;
    std::sort(sorted.begin(), sorted.end());
    const bool distinct = std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end();
    const bool inside = sorted.empty() || (sorted.front() >= 0 && sorted.back() < pool);
    if (static_cast<int64_t>(rows.size()) != N || !distinct || !inside) {
      const std::string wanted = std::to_string(N) + " distinct slots in [0, " + std::to_string(pool) + ")";
      refuse("step_inplace", wanted, text(rows));
    }
  }
  Tensor o = like(v);
  float* states = state.mutable_data_ptr<float>();
  gdn2::step({in.heads, N, in.type, static_cast<float>(scale), view(in.q), view(in.k), view(in.v), view(in.g),
              view(in.b), view(in.w), states, states, slots ? rows.data() : nullptr, 8, o.mutable_data_ptr()},
             threads());
  return o;
}

}  // namespace

// For tests, which run every instruction set the machine has: the index of gdn2::Isa, and whether the machine has it.
extern "C" __attribute__((visibility("default"))) int gdn2_isa() { return static_cast<int>(gdn2::isa()); }
extern "C" __attribute__((visibility("default"))) int gdn2_set_isa(int isa) {
  return gdn2::set_isa(static_cast<gdn2::Isa>(isa));
}
extern "C" __attribute__((visibility("default"))) void gdn2_exp(const float* x, float* y, int64_t count) {
  gdn2::kernels().exp(x, y, count);
}

// The schemas stand in custom_ops/contract.py too, which compares them when it loads this library.
#define GATES "Tensor q, Tensor k, Tensor v, Tensor g, Tensor b, Tensor w"

STABLE_TORCH_LIBRARY_FRAGMENT(gdn2, m) {
  m.def("chunk(" GATES ", Tensor? state, Tensor? cu_seqlens, float scale) -> (Tensor o, Tensor final_state)");
  m.def("chunk_backward(Tensor do, Tensor? dfinal_state, " GATES
        ", Tensor? state, Tensor? cu_seqlens, float scale) -> "
        "(Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor db, Tensor dw, Tensor dstate)");
  m.def("step(" GATES ", Tensor state, float scale) -> (Tensor o, Tensor final_state)");
  m.def("step_inplace(" GATES ", Tensor(a!) state, Tensor? slots, float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(gdn2, CPU, m) {
  m.impl("chunk", TORCH_BOX(&chunk));
  m.impl("chunk_backward", TORCH_BOX(&chunk_backward));
  m.impl("step", TORCH_BOX(&step));
  m.impl("step_inplace", TORCH_BOX(&step_inplace));
}
