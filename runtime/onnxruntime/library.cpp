// The node gdn2::GatedDeltaNet2 in ONNX Runtime on the CPU, with the kernels of gdn2_core: one op for each type of q.
//
//   q k g b [B, T, H, K]   v w o [B, T, HV, V]   initial_state final_state [B, HV, K, V]   attribute scale
//
// T = 1 is a decoding step and allocates nothing here. Both states may be one buffer: a caller binds past and present.
// A registered op takes the node from its function body even where no op has the node's types. Hence all types of the
// schema are here; a runtime too old to run them gets none of them, and runs the body.
#include <algorithm>
#include <mutex>
#include <string>
#include <thread>

#include "abi.h"
#include "core.h"

namespace {

using ort::Api, ort::Status;

constexpr char DOMAIN[] = "gdn2", NAME[] = "GatedDeltaNet2";
constexpr size_t INPUTS = 7, OUTPUTS = 2, G = 3, INITIAL_STATE = 6, FINAL_STATE = 1;
constexpr const char* INPUT_NAMES[INPUTS] = {"q", "k", "v", "g", "b", "w", "initial_state"};
constexpr size_t RANK = 4;

Status* refuse(const Api* api, const std::string& expected, const std::string& got) {
  const std::string text = std::string(DOMAIN) + "::" + NAME + ": expected " + expected + ", got " + got;
  return ort::CreateStatus(api, ort::INVALID_ARGUMENT, text.c_str());
}

struct Shape {
  size_t rank;
  int64_t sizes[RANK];  // of a higher rank the first ones

  bool operator==(const Shape& other) const {
    bool same = rank == other.rank;
    for (size_t i = 0; same && i < rank && i < RANK; ++i) same = sizes[i] == other.sizes[i];
    return same;
  }
};

std::string text(const Shape& shape) {
  std::string list;
  for (size_t i = 0; i < shape.rank && i < RANK; ++i) list += (i ? ", " : "") + std::to_string(shape.sizes[i]);
  return "[" + list + (shape.rank > RANK ? ", ...]" : "]");
}

struct Tensor {
  Shape shape;
  void* data;
};

Status* read_input(const Api* api, const ort::KernelContext* context, size_t index, Tensor& x) {
  const ort::Value* value = nullptr;
  if (Status* failed = ort::KernelContext_GetInput(api, context, index, &value)) return failed;
  ort::TensorTypeAndShapeInfo* info = nullptr;
  if (Status* failed = ort::GetTensorTypeAndShape(api, value, &info)) return failed;
  Status* failed = ort::GetDimensionsCount(api, info, &x.shape.rank);
  if (failed == nullptr) failed = ort::GetDimensions(api, info, x.shape.sizes, RANK);
  ort::ReleaseTensorTypeAndShapeInfo(api, info);
  if (failed != nullptr) return failed;
  return ort::GetTensorMutableData(api, const_cast<ort::Value*>(value), &x.data);
}

Status* new_output(const Api* api, ort::KernelContext* context, size_t index, const Shape& shape, void** data) {
  ort::Value* value = nullptr;
  Status* failed = ort::KernelContext_GetOutput(api, context, index, shape.sizes, shape.rank, &value);
  return failed != nullptr ? failed : ort::GetTensorMutableData(api, value, data);
}

struct Inputs {
  Tensor q, k, v, g, b, w, state;
  int64_t B, T;
  gdn2::Heads heads;

  Status* read(const Api* api, const ort::KernelContext* context) {
    Tensor* const all[INPUTS] = {&q, &k, &v, &g, &b, &w, &state};
    for (size_t i = 0; i < INPUTS; ++i) {
      if (Status* failed = read_input(api, context, i, *all[i])) return failed;
    }
    if (q.shape.rank != RANK) return refuse(api, "q of shape [B, T, H, K]", text(q.shape));
    if (v.shape.rank != RANK) return refuse(api, "v of shape [B, T, HV, V]", text(v.shape));
    B = q.shape.sizes[0], T = q.shape.sizes[1];
    heads = {q.shape.sizes[2], v.shape.sizes[2], q.shape.sizes[3], v.shape.sizes[3]};
    const Shape keys = q.shape, values = {RANK, {B, T, heads.HV, heads.V}};
    const Shape states = {RANK, {B, heads.HV, heads.K, heads.V}};
    const Shape* const wanted[INPUTS] = {&keys, &keys, &values, &keys, &keys, &values, &states};
    for (size_t i = 0; i < INPUTS; ++i) {
      if (all[i]->shape == *wanted[i]) continue;
      return refuse(api, std::string(INPUT_NAMES[i]) + " of shape " + text(*wanted[i]), text(all[i]->shape));
    }
    if (heads.H < 1 || heads.HV < 1 || heads.HV % heads.H != 0) {
      return refuse(api, "HV to be a positive multiple of H = " + std::to_string(heads.H), std::to_string(heads.HV));
    }
    if (heads.K < 1 || heads.V < 1 || heads.K > gdn2::MAX_HEAD || heads.V > gdn2::MAX_HEAD) {
      return refuse(api, "head sizes K and V in 1.." + std::to_string(gdn2::MAX_HEAD),
                    std::to_string(heads.K) + " and " + std::to_string(heads.V));
    }
    return nullptr;
  }

  gdn2::View keys(const Tensor& x) const { return {x.data, T * heads.H * heads.K, heads.H * heads.K}; }
  gdn2::View values(const Tensor& x) const { return {x.data, T * heads.HV * heads.V, heads.HV * heads.V}; }
};

struct Kernel {
  const Api* api;
  gdn2::Type type;
  float scale;
  int threads;
};

// The threads of the session, for one call of a kernel.
struct Threads {
  const Api* api;
  const ort::KernelContext* context;
  Status* failed;

  static void run(void* self, int64_t tasks, void (*body)(void*, int64_t), void* closure) {
    struct Loop {
      void (*body)(void*, int64_t);
      void* closure;
    } loop = {body, closure};
    const auto one = [](void* opaque, size_t task) {
      const Loop& loop = *static_cast<Loop*>(opaque);
      loop.body(loop.closure, static_cast<int64_t>(task));
    };
    Threads& pool = *static_cast<Threads*>(self);
    // Task by task: batches, one or four for each thread, were no faster.
    const size_t count = static_cast<size_t>(tasks), no_batches = 0;
    pool.failed = ort::KernelContext_ParallelFor(pool.api, pool.context, one, count, no_batches, &loop);
  }
};

Status* compute(void* opaque, ort::KernelContext* context) {
  const Kernel& kernel = *static_cast<Kernel*>(opaque);
  Inputs in;
  if (Status* failed = in.read(kernel.api, context)) return failed;
  void *o = nullptr, *final_state = nullptr;
  if (Status* failed = new_output(kernel.api, context, 0, in.v.shape, &o)) return failed;
  if (Status* failed = new_output(kernel.api, context, FINAL_STATE, in.state.shape, &final_state)) return failed;

  const gdn2::View q = in.keys(in.q), k = in.keys(in.k), g = in.keys(in.g), b = in.keys(in.b);
  const gdn2::View v = in.values(in.v), w = in.values(in.w);
  const float* before = static_cast<const float*>(in.state.data);
  float* after = static_cast<float*>(final_state);
  Threads threads = {kernel.api, context, nullptr};
  const gdn2::ThreadPool pool = {Threads::run, &threads, kernel.threads};
  if (in.T == 1) {
    gdn2::step({in.heads, in.B, kernel.type, kernel.scale, q, k, v, g, b, w, before, after, nullptr, 0, o}, pool);
  } else {
    gdn2::chunk({{in.heads, in.B, in.T, nullptr, kernel.type, kernel.scale, q, k, v, g, b, w, before}, o, after}, pool);
  }
  return threads.failed;
}

struct Op : ort::CustomOp {
  gdn2::Type type;
  ort::ElementType element;
};

Status* create(const ort::CustomOp* op, const Api* api, const ort::KernelInfo* info, void** kernel) {
  float scale = 0;
  if (Status* failed = ort::KernelInfoGetAttribute_float(api, info, "scale", &scale)) {
    ort::ReleaseStatus(api, failed);
    return refuse(api, "the attribute scale, a float", "a node without it");
  }
  // The interface does not say how many threads the session has. Too many assumed splits few heads for nothing:
  // 1.2 to 1.7 times the time, with 16 assumed and one there. Too few leaves threads idle, which costs more.
  const int threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  *kernel = new Kernel{api, static_cast<const Op*>(op)->type, scale, threads};
  return nullptr;
}

Op op_of(gdn2::Type type, ort::ElementType element) {
  Op op = {};
  op.type = type;
  op.element = element;
  op.version = ort::API_VERSION;
  op.GetName = [](const ort::CustomOp*) { return NAME; };
  op.GetExecutionProviderType = [](const ort::CustomOp*) { return "CPUExecutionProvider"; };
  op.GetInputTypeCount = [](const ort::CustomOp*) { return INPUTS; };
  op.GetOutputTypeCount = [](const ort::CustomOp*) { return OUTPUTS; };
  op.GetInputType = [](const ort::CustomOp* self, size_t i) -> int {
    return i == G || i == INITIAL_STATE ? ort::FLOAT : static_cast<const Op*>(self)->element;
  };
  op.GetOutputType = [](const ort::CustomOp* self, size_t i) -> int {
    return i == FINAL_STATE ? ort::FLOAT : static_cast<const Op*>(self)->element;
  };
  op.GetInputCharacteristic = [](const ort::CustomOp*, size_t) -> int { return ort::REQUIRED; };
  op.GetOutputCharacteristic = [](const ort::CustomOp*, size_t) -> int { return ort::REQUIRED; };
  op.GetInputMemoryType = [](const ort::CustomOp*, size_t) -> int { return ort::DEFAULT; };
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = compute;
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  return op;
}

Status* new_domain(const Api* api, ort::CustomOpDomain** domain) {
  static const Op ops[] = {op_of(gdn2::Type::f32, ort::FLOAT), op_of(gdn2::Type::f16, ort::FLOAT16),
                           op_of(gdn2::Type::bf16, ort::BFLOAT16)};
  ort::CustomOpDomain* made = nullptr;
  if (Status* failed = ort::CreateCustomOpDomain(api, DOMAIN, &made)) return failed;
  for (const Op& op : ops) {
    if (Status* failed = ort::CustomOpDomain_Add(api, made, &op)) {
      ort::ReleaseCustomOpDomain(api, made);
      return failed;
    }
  }
  *domain = made;
  return nullptr;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) Status* RegisterCustomOps(ort::SessionOptions* options,
                                                                            const ort::ApiBase* base) {
  const Api* api = base->GetApi(ort::API_VERSION);
  if (api == nullptr) return nullptr;
  // Sessions use the domain for as long as they live and nothing says when the last one ends: it is never released.
  static std::mutex mutex;
  static ort::CustomOpDomain* domain = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  if (domain == nullptr) {
    if (Status* failed = new_domain(api, &domain)) return failed;
  }
  return ort::AddCustomOpDomain(api, options, domain);
}
