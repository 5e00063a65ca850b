#include "host.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdio>

namespace gdn2::tensorrt {
namespace {

// Places in virtual tables, which TensorRT 11 changed: ILogger and ILoggerFinder got the four slots of
// IVersionedInterface in front, IPluginRegistry lost its functions for V2 plugins. The loggers of TensorRT-RTX 1.x are
// like those of 11; it runs no plugins, so nothing is registered there.
struct Slots {
  int find_logger, log, register_creator, deregister_creator;
};
constexpr Slots TEN = {0, 0, 12, 15}, ELEVEN = {4, 4, 8, 11};

template <class Function>
Function* slot(void* object, int index) {
  return reinterpret_cast<Function*>((*static_cast<void***>(object))[index]);
}

const Slots* slots_of(void* library) {
  if (library == nullptr) return nullptr;
  const auto version = reinterpret_cast<int32_t (*)()>(dlsym(library, "getInferLibVersion"));
  if (version == nullptr) return nullptr;
  const int32_t major = version() / 10000;  // 101501 is 10.15.1; 10701 is TensorRT-RTX 1.7.1
  return major == 10 ? &TEN : major == 11 || major == 1 ? &ELEVEN : nullptr;
}

// The first of these that is loaded.
void* loaded_library() {
  for (const char* name : {"libnvinfer.so.11", "libnvinfer.so.10", "libnvinfer_lean.so.11", "libnvinfer_lean.so.10",
                           "libnvinfer_dispatch.so.11", "libnvinfer_dispatch.so.10"}) {
    if (void* library = dlopen(name, RTLD_NOLOAD | RTLD_LAZY)) return library;
  }
  return nullptr;
}

// The library that an object's class is from: its virtual functions are there. A plan that carries a runtime of another
// version brings a second TensorRT into the process.
void* library_of(void* object) {
  Dl_info where = {};
  if (dladdr((*static_cast<void***>(object))[0], &where) == 0) return nullptr;
  return dlopen(where.dli_fname, RTLD_NOLOAD | RTLD_LAZY);
}

std::atomic<void*> logger_finder{nullptr};

void* find_logger(const Slots*& slots) {
  if (void* finder = logger_finder.load()) {
    slots = slots_of(library_of(finder));
    if (slots == nullptr) slots = slots_of(loaded_library());
    if (slots != nullptr) {
      if (void* logger = slot<void*(void*)>(finder, slots->find_logger)(finder)) return logger;
    }
  }
  void* library = loaded_library();
  if (library == nullptr) library = dlopen("libtensorrt_rtx.so.1", RTLD_NOLOAD | RTLD_LAZY);
  slots = slots_of(library);
  if (slots == nullptr) return nullptr;
  const auto get_logger = reinterpret_cast<void* (*)()>(dlsym(library, "getLogger"));
  return get_logger == nullptr ? nullptr : get_logger();
}

void* find_registry(const Slots*& slots) {
  void* library = loaded_library();
  slots = slots_of(library);
  if (slots == nullptr) return nullptr;
  const auto get_registry = reinterpret_cast<void* (*)()>(dlsym(library, "getPluginRegistry"));
  return get_registry == nullptr ? nullptr : get_registry();
}

}  // namespace

void use_logger_finder(void* finder) { logger_finder = finder; }

void report(const std::string& text) {
  constexpr int32_t error = 1;
  const Slots* slots = nullptr;
  if (void* logger = find_logger(slots)) {
    slot<void(void*, int32_t, const char*)>(logger, slots->log)(logger, error, text.c_str());
  } else {
    std::fprintf(stderr, "%s\n", text.c_str());
  }
}

bool register_creator(nvinfer1::IPluginCreatorInterface* creator, const char* of_namespace) {
  using Register = bool(void*, nvinfer1::IPluginCreatorInterface*, const char*);
  const Slots* slots = nullptr;
  void* registry = find_registry(slots);
  return registry != nullptr && slot<Register>(registry, slots->register_creator)(registry, creator, of_namespace);
}

void deregister_creator(nvinfer1::IPluginCreatorInterface* creator) {
  const Slots* slots = nullptr;
  if (void* registry = find_registry(slots)) {
    slot<bool(void*, nvinfer1::IPluginCreatorInterface*)>(registry, slots->deregister_creator)(registry, creator);
  }
}

}  // namespace gdn2::tensorrt
