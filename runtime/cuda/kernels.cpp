#include "kernels.h"

#include <cstddef>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

#include "driver.h"

namespace gdn2::cuda {
namespace {

struct Name {
  Parameter parameter;
  size_t offset;
};

// clang-format off
#define GDN2_POINTER(name) {{#name, Kind::pointer}, offsetof(Values, name)}
#define GDN2_SIZE(name) {{#name, Kind::i32}, offsetof(Values, name)}
constexpr Name NAMES[] = {
    GDN2_POINTER(q), GDN2_POINTER(k), GDN2_POINTER(v), GDN2_POINTER(g), GDN2_POINTER(b), GDN2_POINTER(w),
    GDN2_POINTER(state), GDN2_POINTER(slots), GDN2_POINTER(cu_seqlens), GDN2_POINTER(e), GDN2_POINTER(qd),
    GDN2_POINTER(kx), GDN2_POINTER(ax), GDN2_POINTER(ax_rest), GDN2_POINTER(a), GDN2_POINTER(decay), GDN2_POINTER(m),
    GDN2_POINTER(f), GDN2_POINTER(o), GDN2_POINTER(final_state), GDN2_POINTER(states),
    GDN2_POINTER(r),
    GDN2_SIZE(T), GDN2_SIZE(H), GDN2_SIZE(HV), GDN2_SIZE(N), GDN2_SIZE(P), GDN2_SIZE(segments), GDN2_SIZE(length),
    GDN2_SIZE(key_size), GDN2_SIZE(value_size), GDN2_SIZE(backward), {{"scale", Kind::fp32}, offsetof(Values, scale)}};
#undef GDN2_POINTER
#undef GDN2_SIZE
// clang-format on

std::string locate(const Image& image, uint16_t* offsets) {
  if (image.parameter_count + table().hidden_parameters > MAX_PARAMETERS) {
    return std::string(image.key) + ": expected at most " + std::to_string(MAX_PARAMETERS) + " parameters, got more";
  }
  for (int i = 0; i < image.parameter_count; ++i) {
    const Parameter& wanted = image.parameters[i];
    const Name* found = nullptr;
    for (const Name& name : NAMES) {
      if (std::strcmp(name.parameter.name, wanted.name) == 0 && name.parameter.kind == wanted.kind) found = &name;
    }
    if (found == nullptr) return std::string(image.key) + ": no value for the parameter " + wanted.name;
    offsets[i] = static_cast<uint16_t>(found->offset);
  }
  return {};
}

struct Device {
  unsigned long long context;
  int arch;
};

std::string current_device(const Driver& driver, Device& found) {
  void* context = nullptr;
  int device = 0, major = 0, minor = 0;
  if (Result failed = driver.CtxGetCurrent(&context)) return failure(driver, "cuCtxGetCurrent", failed);
  if (context == nullptr) return "expected a current CUDA context, got none";
  if (Result failed = driver.CtxGetId(context, &found.context)) return failure(driver, "cuCtxGetId", failed);
  if (Result failed = driver.CtxGetDevice(&device)) return failure(driver, "cuCtxGetDevice", failed);
  Result failed = driver.DeviceGetAttribute(&major, COMPUTE_CAPABILITY_MAJOR, device);
  if (failed == 0) failed = driver.DeviceGetAttribute(&minor, COMPUTE_CAPABILITY_MINOR, device);
  if (failed != 0) return failure(driver, "cuDeviceGetAttribute", failed);
  found.arch = major * 10 + minor;
  return {};
}

std::string choose(const std::string& key, int arch, const Image*& chosen) {
  std::string archs;
  for (int64_t i = 0; i < table().image_count; ++i) {
    const Image& image = table().images[i];
    if (key != image.key) continue;
    archs += (archs.empty() ? "" : ", ") + std::to_string(image.arch);
    const bool later = !image.exact && image.arch / 10 == arch / 10 && image.arch % 10 < arch % 10;
    const bool serves = image.arch == arch || later;
    if (serves && (chosen == nullptr || chosen->arch < image.arch)) chosen = &image;
  }
  if (chosen != nullptr) return {};
  return "expected a device that " + key + " was built for (sm_" + (archs.empty() ? "none" : archs) + "), got sm_" +
         std::to_string(arch) + "; build the library for it: gdn2 build-plugin";
}

// A context that has ended took its modules along, and no other one gets its id.
std::string load_function(const Driver& driver, const Image& image, unsigned long long context, void*& function) {
  static std::mutex mutex;
  static std::map<std::pair<unsigned long long, const Image*>, void*>& functions =
      *new std::map<std::pair<unsigned long long, const Image*>, void*>;  // outlives other libraries' destructors
  const std::lock_guard<std::mutex> lock(mutex);
  void*& known = functions[{context, &image}];
  if (known == nullptr) {
    void *module = nullptr, *made = nullptr;
    Result failed = driver.ModuleLoadData(&module, image.cubin);
    if (failed != 0) return std::string(image.key) + ": " + failure(driver, "cuModuleLoadData", failed);
    failed = driver.ModuleGetFunction(&made, module, image.symbol);
    if (failed != 0) return std::string(image.key) + ": " + failure(driver, "cuModuleGetFunction", failed);
    if (image.shared_memory > SHARED_MEMORY_OF_EVERY_KERNEL) {
      failed = driver.FuncSetAttribute(made, MAX_DYNAMIC_SHARED_MEMORY, static_cast<int>(image.shared_memory));
      if (failed != 0) return std::string(image.key) + ": " + failure(driver, "cuFuncSetAttribute", failed);
    }
    known = made;
  }
  function = known;
  return {};
}

}  // namespace

bool has_image(const std::string& key) {
  for (int64_t i = 0; i < table().image_count; ++i) {
    if (key == table().images[i].key) return true;
  }
  return false;
}

std::string load(const std::string& key, const Sizes& sizes, Launch& launch) {
  std::string failed;
  const Driver* found = driver(failed);
  if (found == nullptr) return failed;
  Device device = {};
  failed = current_device(*found, device);
  if (!failed.empty()) return failed;
  launch = {};
  failed = choose(key, device.arch, launch.image);
  if (!failed.empty()) return failed;
  failed = locate(*launch.image, launch.offsets);
  if (!failed.empty()) return failed;
  const int64_t programs = launch.image->grid(*launch.image, sizes);
  if (programs < 0 || programs > INT32_MAX) {
    return key + ": expected at most 2**31 - 1 programs, got " + std::to_string(programs);
  }
  launch.programs = static_cast<unsigned>(programs);
  return load_function(*found, *launch.image, device.context, launch.function);
}

std::string Launch::start(const Values& values, void* stream) const {
  if (programs == 0) return {};
  std::string no_driver;
  const Driver& loaded = *driver(no_driver);  // load() found it
  void* addresses[MAX_PARAMETERS];
  char* const base = reinterpret_cast<char*>(const_cast<Values*>(&values));
  int count = 0;
  for (; count < image->parameter_count; ++count) addresses[count] = base + offsets[count];
  for (int i = 0; i < table().hidden_parameters; ++i) addresses[count++] = base + offsetof(Values, hidden);
  const Result failed = loaded.LaunchKernel(function, programs, 1, 1, image->threads, 1, 1, image->shared_memory,
                                            stream, addresses, nullptr);
  return failed == 0 ? std::string() : std::string(image->key) + ": " + failure(loaded, "cuLaunchKernel", failed);
}

}  // namespace gdn2::cuda
