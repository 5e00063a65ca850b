#include "beside.h"

#include <dlfcn.h>

#include <atomic>

#include "kernels.h"

namespace gdn2::cuda {
namespace {

std::atomic<const Table*> opened{nullptr};

std::string folder() {
  Dl_info here = {};
  if (dladdr(&opened, &here) == 0 || here.dli_fname == nullptr) return ".";
  const std::string file = here.dli_fname;
  const size_t slash = file.rfind('/');
  return slash == std::string::npos ? "." : file.substr(0, slash);
}

}  // namespace

std::string open_cubins() {
  if (opened != nullptr) return {};
  const std::string file = folder() + "/libgdn2_cubins.so";
  const std::string way_out = "; this writes them, without a GPU: gdn2 build-plugin --for onnxruntime";
  void* const library = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return std::string("expected GPU kernels beside this library, got none: ") + dlerror() + way_out;
  const auto get = reinterpret_cast<const Table* (*)()>(dlsym(library, "gdn2_cubins"));
  const Table* const found = get == nullptr ? nullptr : get();
  if (found == nullptr || found->format != TABLE_FORMAT) {
    return "expected GPU kernels of format " + std::to_string(TABLE_FORMAT) + " in " + file + ", got " +
           (found == nullptr ? "none" : std::to_string(found->format)) + way_out;
  }
  opened = found;
  return {};
}

const Table& table() { return *opened; }

}  // namespace gdn2::cuda
