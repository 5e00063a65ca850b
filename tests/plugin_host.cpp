// A host of the TensorRT plugin as functions of C, for tests that bring memory and streams of their own: all that
// TensorRT does around enqueue, from the creator to the shapes. Called by plugin_host.py.
#include <dlfcn.h>

#include <cstring>
#include <memory>

#include "abi.h"

using namespace nvinfer1;

namespace {

struct Sizes {
  int64_t B, T, H, HV, K, V;
};

PluginTensorDesc desc(DataType type, int64_t a, int64_t b, int64_t c, int64_t d) {
  return {{4, {a, b, c, d}}, type, TensorFormat::kLINEAR, 1.0f};
}

struct Descs {
  PluginTensorDesc all[9];  // q k v g b w initial_state o final_state

  Descs(const Sizes& s, DataType type) {
    const PluginTensorDesc keys = desc(type, s.B, s.T, s.H, s.K), values = desc(type, s.B, s.T, s.HV, s.V);
    const PluginTensorDesc state = desc(DataType::kFLOAT, s.B, s.HV, s.K, s.V);
    const PluginTensorDesc list[] = {keys, keys, values, keys, keys, values, state, values, state};
    std::memcpy(all, list, sizeof all);
    all[3].type = DataType::kFLOAT;
  }
};

struct Attached {
  std::unique_ptr<IPluginV3> plugin;
  Descs descs;
};

IPluginV3OneRuntime* runtime(IPluginV3* plugin) {
  return static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

}  // namespace

extern "C" {

void* host_open(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return nullptr;
  const auto get = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
  int32_t count = 0;
  return static_cast<IPluginCreatorV3One*>(get(count)[0]);
}

// sizes: B T H HV K V, as they will be; most: B and T that the workspace must suffice for. null: it was refused.
void* host_attach(void* creator, float scale, const int64_t* sizes, const int64_t* most, int32_t type,
                  size_t* workspace) {
  Sizes s, largest;
  std::memcpy(&s, sizes, sizeof s);
  largest = s, largest.B = most[0], largest.T = most[1];
  const auto dtype = static_cast<DataType>(type);
  const PluginField field = {"scale", &scale, PluginFieldType::kFLOAT32, 1};
  const PluginFieldCollection fields = {1, &field};
  auto* made = static_cast<IPluginCreatorV3One*>(creator);
  std::unique_ptr<IPluginV3> built(made->createPlugin("layer", &fields, TensorRTPhase::kBUILD));
  if (built == nullptr) return nullptr;
  auto* build = static_cast<IPluginV3OneBuildV2*>(built->getCapabilityInterface(PluginCapabilityType::kBUILD));
  const Descs now(s, dtype), max(largest, dtype);
  DynamicPluginTensorDesc io[9] = {};
  for (int i = 0; i < 9; ++i) io[i] = {now.all[i], now.all[i].dims, max.all[i].dims, now.all[i].dims};
  for (int i = 0; i < 9; ++i) {
    if (!build->supportsFormatCombination(i, io, 7, 2)) return nullptr;
  }
  if (build->configurePlugin(io, 7, io + 7, 2) != 0) return nullptr;
  *workspace = build->getWorkspaceSize(io, 7, io + 7, 2);
  const PluginFieldCollection* kept = runtime(built.get())->getFieldsToSerialize();
  std::unique_ptr<IPluginV3> restored(made->createPlugin("layer", kept, TensorRTPhase::kRUNTIME));
  if (restored == nullptr) return nullptr;
  std::unique_ptr<IPluginV3> attached(runtime(restored.get())->attachToContext(nullptr));
  if (attached == nullptr || runtime(attached.get())->onShapeChange(now.all, 7, now.all + 7, 2) != 0) return nullptr;
  return new Attached{std::move(attached), now};
}

// tensors: q k v g b w initial_state o final_state.
int32_t host_enqueue(void* attached, void* const* tensors, void* workspace, void* stream) {
  auto* one = static_cast<Attached*>(attached);
  return runtime(one->plugin.get())->enqueue(one->descs.all, one->descs.all + 7, tensors, tensors + 7, workspace, stream);
}

void host_close(void* attached) { delete static_cast<Attached*>(attached); }
}
