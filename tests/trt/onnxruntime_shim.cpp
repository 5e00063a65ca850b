// Our ONNX Runtime library, named in GDN2_LIBRARY, with its kernels on CUDA registered for the CPU and those of the CPU
// left out: ONNX Runtime runs them where there is no GPU.
#include <dlfcn.h>

#include <cstdlib>
#include <string>

#include "abi.h"

namespace {

const ort::ApiBase* real = nullptr;
const ort::Api* real_api = nullptr;
ort::Api api;

ort::Status* add(ort::CustomOpDomain* domain, const ort::CustomOp* op) {
  if (std::string(op->GetExecutionProviderType(op)) != "CUDAExecutionProvider") return nullptr;
  const_cast<ort::CustomOp*>(op)->GetExecutionProviderType = [](const ort::CustomOp*) { return "CPUExecutionProvider"; };
  return ort::CustomOpDomain_Add(real_api, domain, op);
}

}  // namespace

extern "C" ort::Status* RegisterCustomOps(ort::SessionOptions* options, const ort::ApiBase* base) {
  real = base, real_api = base->GetApi(ort::API_VERSION), api = *real_api;
  constexpr int CUSTOM_OP_DOMAIN_ADD = 27;
  api.slots[CUSTOM_OP_DOMAIN_ADD] = reinterpret_cast<void (*)()>(add);
  void* const library = dlopen(std::getenv("GDN2_LIBRARY"), RTLD_NOW | RTLD_LOCAL);
  const auto enter = reinterpret_cast<decltype(&RegisterCustomOps)>(dlsym(library, "RegisterCustomOps"));
  static const ort::ApiBase changed = {[](uint32_t) -> const ort::Api* { return &api; }, real->GetVersionString};
  return enter(options, &changed);
}
