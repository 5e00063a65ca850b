#include "driver.h"

#include <dlfcn.h>

namespace gdn2::cuda {
namespace {

struct Found {
  Driver driver = {};
  std::string why;  // empty: there is a driver

  template <class Function>
  void take(void* library, const char* name, Function*& function) {
    function = reinterpret_cast<Function*>(dlsym(library, name));
    if (function == nullptr && why.empty()) {
      why = std::string("expected a CUDA driver of 12.0 or newer, got one without ") + name;
    }
  }

  Found() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      why = std::string("expected a CUDA driver, got none: ") + dlerror();
      return;
    }
    take(library, "cuCtxGetCurrent", driver.CtxGetCurrent);
    take(library, "cuCtxGetId", driver.CtxGetId);
    take(library, "cuCtxGetDevice", driver.CtxGetDevice);
    take(library, "cuDeviceGetAttribute", driver.DeviceGetAttribute);
    take(library, "cuModuleLoadData", driver.ModuleLoadData);
    take(library, "cuModuleGetFunction", driver.ModuleGetFunction);
    take(library, "cuFuncSetAttribute", driver.FuncSetAttribute);
    take(library, "cuLaunchKernel", driver.LaunchKernel);
    take(library, "cuGetErrorName", driver.GetErrorName);
  }
};

}  // namespace

const Driver* driver(std::string& why) {
  static const Found found;
  why = found.why;
  return found.why.empty() ? &found.driver : nullptr;
}

std::string failure(const Driver& driver, const char* function, Result result) {
  const char* name = nullptr;
  if (driver.GetErrorName(result, &name) != 0 || name == nullptr) name = "an unknown error";
  return std::string(function) + ": " + name;
}

}  // namespace gdn2::cuda
