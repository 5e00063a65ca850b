// The node on the CPU: the kernels of gdn2_core on the threads of the session.
//
// T = 1 is a decoding step and allocates nothing here. Both states may be one buffer: a caller binds past and present.
#include <algorithm>
#include <thread>

#include "core.h"
#include "node.h"

namespace gdn2::onnxruntime {
namespace {

struct Kernel {
  const Api* api;
  gdn2::Type type;
  float scale;
  int threads;
};

Status* check(const Api* api, const gdn2::Heads& heads) {
  if (heads.H < 1 || heads.HV < 1 || heads.HV % heads.H != 0) {
    return refuse(api, "expected HV to be a positive multiple of H = " + std::to_string(heads.H) + ", got " +
                           std::to_string(heads.HV));
  }
  if (heads.K < 1 || heads.V < 1 || heads.K > gdn2::MAX_HEAD || heads.V > gdn2::MAX_HEAD) {
    return refuse(api, "expected head sizes K and V in 1.." + std::to_string(gdn2::MAX_HEAD) + ", got " +
                           std::to_string(heads.K) + " and " + std::to_string(heads.V));
  }
  return nullptr;
}

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
  Outputs out;
  if (Status* failed = in.read(kernel.api, context)) return failed;
  const gdn2::Heads heads = {in.H, in.HV, in.K, in.V};
  if (Status* failed = check(kernel.api, heads)) return failed;
  if (Status* failed = out.make(kernel.api, context, in)) return failed;

  const auto keys = [&](const Tensor& x) { return gdn2::View{x.data, in.T * in.H * in.K, in.H * in.K}; };
  const auto values = [&](const Tensor& x) { return gdn2::View{x.data, in.T * in.HV * in.V, in.HV * in.V}; };
  const gdn2::View q = keys(in.q), k = keys(in.k), g = keys(in.g), b = keys(in.b), v = values(in.v), w = values(in.w);
  const float* before = static_cast<const float*>(in.state.data);
  float* after = static_cast<float*>(out.final_state);
  Threads threads = {kernel.api, context, nullptr};
  const gdn2::ThreadPool pool = {Threads::run, &threads, kernel.threads};
  if (in.T == 1) {
    gdn2::step({heads, in.B, kernel.type, kernel.scale, q, k, v, g, b, w, before, after, nullptr, 0, out.o}, pool);
    return threads.failed;
  }
  const gdn2::Sequences sequences = {heads, in.B, in.T, nullptr, kernel.type, kernel.scale, q, k, v, g, b, w, before};
  const bool done = gdn2::chunk({sequences, out.o, after}, pool);
  if (threads.failed != nullptr || done) return threads.failed;
  return refuse(kernel.api, "expected memory for its scratch, got none", ort::FAIL);
}

gdn2::Type type_of(ort::ElementType element) {
  return element == ort::FLOAT ? gdn2::Type::f32 : element == ort::FLOAT16 ? gdn2::Type::f16 : gdn2::Type::bf16;
}

Status* create(const ort::CustomOp* op, const Api* api, const ort::KernelInfo* info, void** kernel) {
  float scale = 0;
  if (Status* failed = read_scale(api, info, &scale)) return failed;
  // The interface does not say how many threads the session has. Too many assumed splits few heads for nothing:
  // 1.2 to 1.7 times the time, with 16 assumed and one there. Too few leaves threads idle, which costs more.
  const int threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  *kernel = new Kernel{api, type_of(static_cast<const Op*>(op)->element), scale, threads};
  return nullptr;
}

}  // namespace

void use_cpu(Op& op) {
  op.GetExecutionProviderType = [](const ort::CustomOp*) { return "CPUExecutionProvider"; };
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = compute;
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
}

}  // namespace gdn2::onnxruntime
