// gdn2::GatedDeltaNet2 in ONNX Runtime: an op for each provider, CPU and CUDA, and each type of q.
//
// A registered op takes the node from its function body even where no op has the node's types. Hence all types of the
// schema are here; a runtime too old to run them gets none of them, and runs the body. ONNX Runtime ignores the ops of
// providers that a session does not have.
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "node.h"

namespace {

using namespace gdn2::onnxruntime;

Op op_of(ort::ElementType element, void (&use_provider)(Op&)) {
  Op op = {};
  op.element = element;
  op.version = ort::API_VERSION;
  op.GetName = [](const ort::CustomOp*) { return NAME; };
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
  use_provider(op);
  return op;
}

// Whether a version like 1.31.1 has what kernels on CUDA need. To ask an older one for its interface prints an error.
bool has_cuda_api(const char* version) {
  const char* const point = std::strchr(version, '.');
  const int major = std::atoi(version), minor = point == nullptr ? 0 : std::atoi(point + 1);
  return major > 1 || minor >= ort::CUDA_API_VERSION;
}

Status* new_domain(const Api* api, bool with_cuda, ort::CustomOpDomain** domain) {
  static const Op cpu[] = {op_of(ort::FLOAT, use_cpu), op_of(ort::FLOAT16, use_cpu), op_of(ort::BFLOAT16, use_cpu)};
  static const Op cuda[] = {op_of(ort::FLOAT, use_cuda), op_of(ort::FLOAT16, use_cuda), op_of(ort::BFLOAT16, use_cuda)};
  ort::CustomOpDomain* made = nullptr;
  if (Status* failed = ort::CreateCustomOpDomain(api, DOMAIN, &made)) return failed;
  Status* failed = nullptr;
  for (const Op& op : cpu) {
    if (failed == nullptr) failed = ort::CustomOpDomain_Add(api, made, &op);
  }
  for (const Op& op : cuda) {
    if (failed == nullptr && with_cuda) failed = ort::CustomOpDomain_Add(api, made, &op);
  }
  if (failed != nullptr) {
    ort::ReleaseCustomOpDomain(api, made);
    return failed;
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
    if (Status* failed = new_domain(api, has_cuda_api(base->GetVersionString()), &domain)) return failed;
  }
  return ort::AddCustomOpDomain(api, options, domain);
}
