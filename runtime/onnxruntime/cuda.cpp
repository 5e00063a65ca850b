// The node on CUDA: the launches of runtime/cuda on ONNX Runtime's stream, with ONNX Runtime's memory as workspace.
//
// The cubins are in a file beside this library. Without it no session that places the node on CUDA is made; on a
// machine without CUDA nobody asks for it.
#include <mutex>

#include "beside.h"
#include "driver.h"
#include "node.h"
#include "operators.h"

namespace gdn2::onnxruntime {
namespace {

using cuda::Operator, cuda::Problem;

struct Kernel {
  const Api* api;
  cuda::Type type;
  float scale;
  ort::Allocator* allocator;           // of the provider's device, owned
  const ort::MemoryInfo* memory_info;  // the allocator's
  std::mutex mutex;                    // runs of one session may overlap
  Problem planned = {};
  Operator plan = {};

  // The launches of a problem: those of the last one where it is the same, as it is from one token to the next.
  std::string plan_of(const Problem& problem, Operator& found) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!plan.is_loaded() || !(planned == problem)) {
      std::string failed = plan.load(problem);
      if (!failed.empty()) return failed;
      planned = problem;
    }
    found = plan;
    return {};
  }
};

// Memory of the stream: once given back, what comes next on the stream may have it, and only that.
struct Workspace {
  const Kernel& kernel;
  void* memory = nullptr;

  Status* take(const ort::KernelContext* context, size_t bytes) {
    if (bytes == 0) return nullptr;
    return ort::KernelContext_GetScratchBuffer(kernel.api, context, kernel.memory_info, bytes, &memory);
  }
  ~Workspace() {
    if (memory == nullptr) return;
    if (Status* failed = ort::AllocatorFree(kernel.api, kernel.allocator, memory)) {
      ort::ReleaseStatus(kernel.api, failed);
    }
  }
};

Status* compute(void* opaque, ort::KernelContext* context) {
  Kernel& kernel = *static_cast<Kernel*>(opaque);
  const Api* const api = kernel.api;
  Inputs in;
  Outputs out;
  Operator plan;
  if (Status* failed = in.read(api, context)) return failed;
  std::string wrong = kernel.plan_of({in.B, in.T, in.H, in.HV, in.K, in.V, kernel.type}, plan);
  if (!wrong.empty()) return refuse(api, wrong, ort::FAIL);
  if (Status* failed = out.make(api, context, in)) return failed;
  Workspace workspace = {kernel};
  if (Status* failed = workspace.take(context, plan.workspace_bytes())) return failed;
  void* stream = nullptr;
  if (Status* failed = ort::KernelContext_GetGPUComputeStream(api, context, &stream)) return failed;
  wrong = plan.run({in.q.data, in.k.data, in.v.data, in.g.data, in.b.data, in.w.data, in.state.data, out.o,
                    out.final_state}, kernel.scale, workspace.memory, stream);
  return wrong.empty() ? nullptr : refuse(api, wrong, ort::FAIL);
}

cuda::Type type_of(ort::ElementType element) {
  return element == ort::FLOAT ? cuda::Type::f32 : element == ort::FLOAT16 ? cuda::Type::f16 : cuda::Type::bf16;
}

Status* create(const ort::CustomOp* op, const Api* api, const ort::KernelInfo* info, void** kernel) {
  float scale = 0;
  if (Status* failed = read_scale(api, info, &scale)) return failed;
  std::string wrong = cuda::open_cubins();
  if (wrong.empty()) cuda::driver(wrong);
  if (!wrong.empty()) return refuse(api, wrong, ort::FAIL);
  ort::Allocator* allocator = nullptr;
  if (Status* failed = ort::KernelInfoGetAllocator(api, info, ort::DEFAULT, &allocator)) return failed;
  const ort::MemoryInfo* memory_info = nullptr;
  if (Status* failed = ort::AllocatorGetInfo(api, allocator, &memory_info)) {
    ort::ReleaseAllocator(api, allocator);
    return failed;
  }
  *kernel = new Kernel{api, type_of(static_cast<const Op*>(op)->element), scale, allocator, memory_info, {}};
  return nullptr;
}

void destroy(void* opaque) {
  Kernel* const kernel = static_cast<Kernel*>(opaque);
  ort::ReleaseAllocator(kernel->api, kernel->allocator);
  delete kernel;
}

}  // namespace

void use_cuda(Op& op) {
  op.GetExecutionProviderType = [](const ort::CustomOp*) { return "CUDAExecutionProvider"; };
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = compute;
  op.KernelDestroy = destroy;
}

}  // namespace gdn2::onnxruntime
