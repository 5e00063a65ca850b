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
#include <utility>
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

// What is asked of a tensor, asked once: every question is a call into torch.
struct Seen {
  explicit Seen(const Tensor& x)
      : tensor(x), shape(x.sizes()), strides(x.strides()), type(x.scalar_type()), on_cpu(x.is_cpu()) {}

  const Tensor& tensor;
  Sizes shape, strides;
  ScalarType type;
  bool on_cpu;
};

void expect(const char* op, const char* name, const Seen& x, Sizes shape, ScalarType type) {
  if (!x.on_cpu) refuse(op, name + std::string(" on cpu"), "another device");
  if (x.type != type) refuse(op, std::string(name) + " of dtype " + text(type), text(x.type));
  if (!std::equal(x.shape.begin(), x.shape.end(), shape.begin(), shape.end())) {
    refuse(op, std::string(name) + " of shape " + text(shape), text(x.shape));
  }
}

gdn2::Type type_of(const char* op, const Seen& q) {
  switch (q.type) {
    case ScalarType::Float: return gdn2::Type::f32;
    case ScalarType::BFloat16: return gdn2::Type::bf16;
    case ScalarType::Half: return gdn2::Type::f16;
    default: refuse(op, "q of dtype float32, bfloat16 or float16", text(q.type));
  }
}

Tensor packed(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// [batch, heads, channels] or [batch, tokens, heads, channels], copied where the last two axes are not contiguous.
class Rows {
 public:
  Rows() = default;
  explicit Rows(const Seen& x) { take(x); }

  void take(const Seen& x) {
    const size_t rank = x.shape.size();
    const int64_t heads = x.shape[rank - 2], channels = x.shape[rank - 1];
    const bool packed =
        (channels == 1 || x.strides[rank - 1] == 1) && (heads == 1 || x.strides[rank - 2] == channels);
    if (!packed) copy_ = torch::stable::contiguous(x.tensor);
    const Sizes strides = packed ? x.strides : copy_->strides();
    view = {(packed ? x.tensor : *copy_).const_data_ptr(), strides[0], rank == 4 ? strides[1] : 0};
    if (std::find(x.shape.begin(), x.shape.end(), 0) != x.shape.end()) return;
    begin_ = static_cast<const char*>(packed ? view.data : x.tensor.const_data_ptr());
    int64_t last = 0;
    for (size_t i = 0; i < rank; ++i) last += (x.shape[i] - 1) * x.strides[i];
    end_ = begin_ + (last + 1) * (x.type == ScalarType::Float ? 4 : 2);
  }

  // Whether [begin, end) meets the memory from the first number of the tensor to its last. An empty one has none.
  bool overlaps(const void* begin, const void* end) const { return begin_ < end && begin < end_; }

  gdn2::View view{};

 private:
  std::optional<Tensor> copy_;
  const char *begin_ = nullptr, *end_ = nullptr;
};

struct Inputs {
  const char* op;
  int64_t B, T;  // T = 1 without an axis of tokens
  gdn2::Heads heads;
  gdn2::Type type;
  Rows q, k, v, g, b, w;

  Inputs(const char* op, size_t rank, const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& g_,
         const Tensor& b_, const Tensor& w_)
      : op(op) {
    const Seen q(q_), v(v_);
    type = type_of(op, q);
    if (q.shape.size() != rank) refuse(op, "q of rank " + std::to_string(rank), text(q.shape));
    if (v.shape.size() != rank) refuse(op, "v of rank " + std::to_string(rank), text(v.shape));
    int64_t values_shape[4];  // the batch and tokens of q, the heads and channels of v
    std::copy_n(q.shape.begin(), rank - 2, values_shape);
    std::copy_n(v.shape.end() - 2, 2, values_shape + rank - 2);
    const Sizes keys = q.shape, values(values_shape, rank);
    const Seen k(k_), g(g_), b(b_), w(w_);
    expect(op, "q", q, keys, q.type);
    expect(op, "k", k, keys, q.type);
    expect(op, "b", b, keys, q.type);
    expect(op, "g", g, keys, ScalarType::Float);
    expect(op, "v", v, values, q.type);
    expect(op, "w", w, values, q.type);
    B = keys[0];
    T = rank == 4 ? keys[1] : 1;
    heads = {keys[rank - 2], values[rank - 2], keys[rank - 1], values[rank - 1]};
    if (heads.H < 1 || heads.HV < 1 || heads.HV % heads.H != 0) {
      refuse(op, "HV to be a positive multiple of H = " + std::to_string(heads.H), std::to_string(heads.HV));
    }
    if (std::min(heads.K, heads.V) < 1 || std::max(heads.K, heads.V) > gdn2::MAX_HEAD) {
      refuse(op, "head sizes K and V in 1..256", std::to_string(heads.K) + " and " + std::to_string(heads.V));
    }
    this->q.take(q), this->k.take(k), this->v.take(v), this->g.take(g), this->b.take(b), this->w.take(w);
  }

  std::array<int64_t, 4> state_shape(int64_t states) const { return {states, heads.HV, heads.K, heads.V}; }
};

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
      : in(std::move(inputs)), N(in.B), scale(static_cast<float>(scale)) {
    if (cu_seqlens) {
      bounds = indices(in.op, "cu_seqlens", *cu_seqlens);
      if (in.B != 1) refuse(in.op, "batch 1 with cu_seqlens", std::to_string(in.B));
      const bool whole = bounds.size() > 1 && bounds.front() == 0 && bounds.back() == in.T;
      if (!whole || !std::is_sorted(bounds.begin(), bounds.end())) {
        refuse(in.op, "cu_seqlens to start at 0, never fall and end at T = " + std::to_string(in.T), text(bounds));
      }
      N = static_cast<int64_t>(bounds.size()) - 1;
    }
    if (state) {
      expect(in.op, "state", Seen(*state), in.state_shape(N), ScalarType::Float);
      this->state = packed(*state);
    }
  }

  gdn2::Sequences core() const {
    return {in.heads,  N,         in.T,      bounds.empty() ? nullptr : bounds.data(),
            in.type,   scale,     in.q.view, in.k.view,
            in.v.view, in.g.view, in.b.view, in.w.view,
            state ? state->const_data_ptr<float>() : nullptr};
  }
};

// A contiguous tensor with the dtype of x. torch::stable::new_empty would look its operator up by name at every call, and
// aoti_torch_aten_new_empty dispatches twice.
Tensor new_tensor(const Tensor& x, Sizes shape) {
  const int64_t rank = static_cast<int64_t>(shape.size());
  int64_t strides[4], next = 1;
  for (int64_t i = rank - 1; i >= 0; --i) {
    strides[i] = next;
    next *= std::max<int64_t>(shape[i], 1);
  }
  int32_t dtype = 0;
  AtenTensorHandle created = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(rank, shape.data(), strides, dtype, aoti_torch_device_type_cpu(), -1, &created));
  return Tensor(created);
}

Tensor like(const Tensor& x) { return new_tensor(x, x.sizes()); }

std::tuple<Tensor, Tensor> chunk(const Tensor q, const Tensor k, const Tensor v, const Tensor g, const Tensor b,
                                 const Tensor w, const std::optional<Tensor> state,
                                 const std::optional<Tensor> cu_seqlens, double scale) {
  const Sequences in(Inputs("chunk", 4, q, k, v, g, b, w), state, cu_seqlens, scale);
  Tensor o = like(v), final_state = new_tensor(g, in.in.state_shape(in.N));
  const bool done = gdn2::chunk({in.core(), o.mutable_data_ptr(), final_state.mutable_data_ptr<float>()}, threads());
  if (!done) refuse("chunk", "memory for its scratch", "none");
  return {o, final_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> chunk_backward(
    const Tensor do_, const std::optional<Tensor> dfinal_state, const Tensor q, const Tensor k, const Tensor v,
    const Tensor g, const Tensor b, const Tensor w, const std::optional<Tensor> state,
    const std::optional<Tensor> cu_seqlens, double scale) {
  const Sequences in(Inputs("chunk_backward", 4, q, k, v, g, b, w), state, cu_seqlens, scale);
  const Seen seen_do(do_);
  expect("chunk_backward", "do", seen_do, v.sizes(), v.scalar_type());
  const Rows do_rows(seen_do);
  std::optional<Tensor> dfinal;
  if (dfinal_state) {
    expect("chunk_backward", "dfinal_state", Seen(*dfinal_state), in.in.state_shape(in.N), ScalarType::Float);
    dfinal = packed(*dfinal_state);
  }
  Tensor dq = like(q), dk = like(k), dv = like(v), dg = like(g), db = like(b), dw = like(w);
  Tensor dstate = new_tensor(g, in.in.state_shape(in.N));
  const bool done = gdn2::chunk_backward(
      {in.core(), do_rows.view, dfinal ? dfinal->const_data_ptr<float>() : nullptr, dq.mutable_data_ptr(),
       dk.mutable_data_ptr(), dv.mutable_data_ptr(), dg.mutable_data_ptr<float>(), db.mutable_data_ptr(),
       dw.mutable_data_ptr(), dstate.mutable_data_ptr<float>()},
      threads());
  if (!done) refuse("chunk_backward", "memory for its scratch", "none");
  return {dq, dk, dv, dg, db, dw, dstate};
}

std::tuple<Tensor, Tensor> step(const Tensor q, const Tensor k, const Tensor v, const Tensor g, const Tensor b,
                                const Tensor w, const Tensor state, double scale) {
  const Inputs in("step", 3, q, k, v, g, b, w);
  expect("step", "state", Seen(state), in.state_shape(in.B), ScalarType::Float);
  const Tensor before = packed(state);
  Tensor o = like(v), after = new_tensor(g, in.state_shape(in.B));
  gdn2::step({in.heads, in.B, in.type, static_cast<float>(scale), in.q.view, in.k.view, in.v.view, in.g.view,
              in.b.view, in.w.view, before.const_data_ptr<float>(), after.mutable_data_ptr<float>(), nullptr, 0,
              o.mutable_data_ptr()},
             threads());
  return {o, after};
}

Tensor step_inplace(const Tensor q, const Tensor k, const Tensor v, const Tensor g, const Tensor b, const Tensor w,
                    Tensor state, const std::optional<Tensor> slots, double scale) {
  const Inputs in("step_inplace", 3, q, k, v, g, b, w);
  const Seen seen_state(state);
  const int64_t N = in.B, pool = slots && !seen_state.shape.empty() ? seen_state.shape[0] : N;
  expect("step_inplace", "state", seen_state, in.state_shape(pool), ScalarType::Float);
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
  float* const states = state.mutable_data_ptr<float>();
  const float* const states_end = states + pool * in.heads.HV * in.heads.K * in.heads.V;
  const std::pair<const char*, const Rows*> inputs[] = {{"q", &in.q}, {"k", &in.k}, {"v", &in.v},
                                                        {"g", &in.g}, {"b", &in.b}, {"w", &in.w}};
  for (const auto& [name, rows_of] : inputs) {
    if (rows_of->overlaps(states, states_end)) {
      refuse("step_inplace", "state apart in memory from the other arguments", std::string(name) + " across it");
    }
  }
  Tensor o = like(v);
  gdn2::step({in.heads, N, in.type, static_cast<float>(scale), in.q.view, in.k.view, in.v.view, in.g.view, in.b.view,
              in.w.view, states, states, slots ? rows.data() : nullptr, 8, o.mutable_data_ptr()},
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
