// Drives a plugin library as TensorRT does, from a script on standard input, and prints one JSON object a line.
//
//   run B T H HV K V type scale most_B most_T    build and run one problem; types: 0 float, 1 half, 7 bfloat16
//   field name type number                       a creator's answer to one field
//   types q k v g b w state                      getOutputDataTypes
//   shape i d0 d1 d2 d3                          onShapeChange of a good problem, then with another input i
//   misaligned                                   enqueue with k at no multiple of 16 bytes
//   threads n B T                                as many threads, each with its own clone and context of TensorRT
//   context id                                   makes another context current; 0 is none
//
// Device memory is host memory here: only a recording libcuda looks at it.
#include <dlfcn.h>
#include <malloc.h>

#include <atomic>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "abi.h"

using namespace nvinfer1;

static thread_local bool counting = false;
static thread_local int allocations = 0;
extern "C" void* __libc_malloc(size_t);
extern "C" void* malloc(size_t size) {  // takes the place of the C library's, for plugins too
  allocations += counting;
  return __libc_malloc(size);
}

namespace {

[[noreturn]] void fail(const char* what) {
  std::printf("{\"failed\": \"%s\"}\n", what);
  std::exit(1);
}
#define EXPECT(truth) \
  if (!(truth)) fail(#truth)

struct Problem {
  int64_t B, T, H, HV, K, V;
  DataType type;
};

PluginTensorDesc desc(DataType type, std::vector<int64_t> sizes) {
  PluginTensorDesc x = {};
  x.dims.nbDims = int32_t(sizes.size());
  for (size_t i = 0; i < sizes.size(); ++i) x.dims.d[i] = sizes[i];
  x.type = type;
  return x;
}

// q k v g b w initial_state o final_state
std::vector<PluginTensorDesc> descs(const Problem& p) {
  const std::vector<int64_t> keys = {p.B, p.T, p.H, p.K}, values = {p.B, p.T, p.HV, p.V}, state = {p.B, p.HV, p.K, p.V};
  const DataType f32 = DataType::kFLOAT;
  return {desc(p.type, keys), desc(p.type, keys), desc(p.type, values), desc(f32, keys), desc(p.type, keys),
          desc(p.type, values), desc(f32, state), desc(p.type, values), desc(f32, state)};
}

IPluginCreatorV3One* creator = nullptr;

template <class Interface>
Interface* capability(IPluginV3* plugin, PluginCapabilityType type) {
  auto* found = static_cast<Interface*>(plugin->getCapabilityInterface(type));
  EXPECT(found != nullptr);
  return found;
}

IPluginV3OneBuildV2* build(IPluginV3* plugin) {
  return capability<IPluginV3OneBuildV2>(plugin, PluginCapabilityType::kBUILD);
}
IPluginV3OneRuntime* runtime(IPluginV3* plugin) {
  return capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
}

std::unique_ptr<IPluginV3> create(float scale, TensorRTPhase phase) {
  const PluginField field = {"scale", &scale, PluginFieldType::kFLOAT32, 1};
  const PluginFieldCollection fields = {1, &field};
  std::unique_ptr<IPluginV3> made(creator->createPlugin("layer", &fields, phase));
  EXPECT(made != nullptr);
  return made;
}

// Position by position, each with the ones before it settled, as TensorRT negotiates.
void negotiate(IPluginV3OneBuildV2* plugin, const Problem& p) {
  DynamicPluginTensorDesc io[9] = {};
  const auto wanted = descs(p);
  for (int at = 0; at < 9; ++at) {
    io[at].desc = wanted[at];
    EXPECT(plugin->supportsFormatCombination(at, io, 7, 2));
    for (DataType other : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16, DataType::kINT8, DataType::kINT32}) {
      io[at].desc.type = other;
      const bool chosen = at == 0 && other != DataType::kINT8 && other != DataType::kINT32;
      EXPECT(plugin->supportsFormatCombination(at, io, 7, 2) == (chosen || other == wanted[at].type));
    }
    io[at].desc = wanted[at];
    io[at].desc.format = static_cast<TensorFormat>(1);
    EXPECT(!plugin->supportsFormatCombination(at, io, 7, 2));
    io[at].desc = wanted[at];
  }
}

// The outputs have the very expressions of v and of the initial state.
void infer_shapes(IPluginV3OneBuildV2* plugin) {
  char names[7][4];
  DimsExprs in[7], out[2] = {};
  for (int i = 0; i < 7; ++i) {
    in[i].nbDims = 4;
    for (int d = 0; d < 4; ++d) in[i].d[d] = reinterpret_cast<const IDimensionExpr*>(&names[i][d]);
  }
  EXPECT(plugin->getOutputShapes(in, 7, nullptr, 0, out, 2, *reinterpret_cast<IExprBuilder*>(names)) == 0);
  EXPECT(out[0].nbDims == 4 && std::memcmp(out[0].d, in[2].d, 4 * sizeof(void*)) == 0);
  EXPECT(out[1].nbDims == 4 && std::memcmp(out[1].d, in[6].d, 4 * sizeof(void*)) == 0);
}

int configure(IPluginV3OneBuildV2* plugin, const Problem& p, int64_t most_B, int64_t most_T, size_t& workspace) {
  Problem least = p, most = p, network = p;
  least.B = least.T = 0, most.B = most_B, most.T = most_T, network.B = network.T = -1;
  const auto a = descs(network), b = descs(least), c = descs(most), d = descs(p);
  DynamicPluginTensorDesc io[9] = {};
  for (int i = 0; i < 9; ++i) io[i] = {a[i], b[i].dims, c[i].dims, d[i].dims};
  const int status = plugin->configurePlugin(io, 7, io + 7, 2);
  workspace = status == 0 ? plugin->getWorkspaceSize(io, 7, io + 7, 2) : 0;
  return status;
}

size_t bytes(const PluginTensorDesc& x) {
  size_t count = x.type == DataType::kFLOAT ? 4 : 2;
  for (int i = 0; i < x.dims.nbDims; ++i) count *= size_t(x.dims.d[i]);
  return count;
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<void, Free>;

Memory allocate(size_t size) { return Memory(std::aligned_alloc(256, (size + 256) / 256 * 256)); }

int enqueue(IPluginV3OneRuntime* plugin, const Problem& p, size_t workspace_bytes, std::vector<uintptr_t>* addresses,
            int* allocated, bool misaligned = false) {
  const auto all = descs(p);
  std::vector<Memory> memory;
  for (const PluginTensorDesc& x : all) memory.push_back(allocate(bytes(x) + 4));
  Memory workspace = allocate(workspace_bytes);
  const void* in[7];
  void* out[2] = {memory[7].get(), memory[8].get()};
  for (int i = 0; i < 7; ++i) in[i] = memory[i].get();
  if (misaligned) in[1] = static_cast<const char*>(in[1]) + 4;
  allocations = 0, counting = true;
  void* const stream = reinterpret_cast<void*>(0x5);
  const int status = plugin->enqueue(all.data(), all.data() + 7, in, out, workspace.get(), stream);
  counting = false;
  *allocated = allocations;
  if (addresses != nullptr) {
    for (int i = 0; i < 9; ++i) addresses->push_back(reinterpret_cast<uintptr_t>(memory[i].get()));
    addresses->push_back(reinterpret_cast<uintptr_t>(workspace.get()));
  }
  return status;
}

void run(std::istringstream& words) {
  Problem p;
  int type;
  float scale;
  int64_t most_B, most_T;
  words >> p.B >> p.T >> p.H >> p.HV >> p.K >> p.V >> type >> scale >> most_B >> most_T;
  p.type = static_cast<DataType>(type);

  auto made = create(scale, TensorRTPhase::kBUILD);
  negotiate(build(made.get()), p);
  infer_shapes(build(made.get()));
  EXPECT(build(made.get())->getNbOutputs() == 2 && build(made.get())->getTimingCacheID() != nullptr);
  EXPECT(build(made.get())->getAliasedInput(0) == -1 && build(made.get())->getAliasedInput(1) == -1);
  size_t workspace = 0;
  const int configured = configure(build(made.get()), p, most_B, most_T, workspace);
  if (configured != 0) {
    std::printf("{\"configured\": %d}\n", configured);
    return;
  }
  // The engine keeps the fields, a runtime makes a plugin of them, every context has a clone of its own.
  std::unique_ptr<IPluginV3> copy(made->clone());
  made.reset();
  const PluginFieldCollection* fields = runtime(copy.get())->getFieldsToSerialize();
  std::unique_ptr<IPluginV3> restored(creator->createPlugin("layer", fields, TensorRTPhase::kRUNTIME));
  EXPECT(restored != nullptr && fields->nbFields == 1);
  copy.reset();
  std::unique_ptr<IPluginV3> attached(runtime(restored.get())->attachToContext(nullptr));
  EXPECT(attached != nullptr && attached != restored);
  restored.reset();
  const auto all = descs(p);
  const int changed = runtime(attached.get())->onShapeChange(all.data(), 7, all.data() + 7, 2);
  std::vector<uintptr_t> addresses;
  int allocated = 0, queued = -1;
  std::printf("{\"enqueue\": true}\n");
  if (changed == 0) queued = enqueue(runtime(attached.get()), p, workspace, &addresses, &allocated);
  std::printf("{\"configured\": 0, \"changed\": %d, \"queued\": %d, \"allocations\": %d, ", changed, queued, allocated);
  std::printf("\"bytes\": %zu, \"at\": [", workspace);
  for (size_t i = 0; i < addresses.size(); ++i) std::printf("%s%" PRIuPTR, i == 0 ? "" : ", ", addresses[i]);
  std::printf("]}\n");
}

void field(std::istringstream& words) {
  std::string name, text;
  int type;
  words >> name >> type >> text;
  const double number = std::strtod(text.c_str(), nullptr);
  const float f32 = float(number);
  const int32_t i32 = int32_t(number);
  const int64_t i64 = int64_t(number);
  const void* const numbers[] = {&f32, &number, &i32, &i64};
  const void* data = numbers[type == 1 ? 0 : type == 2 ? 1 : type == 5 ? 2 : 3];
  const PluginField one = {name.c_str(), data, static_cast<PluginFieldType>(type), 1};
  const PluginFieldCollection fields = {name == "none" ? 0 : 1, &one};
  std::unique_ptr<IPluginV3> made(creator->createPlugin("layer", &fields, TensorRTPhase::kBUILD));
  const PluginFieldCollection* kept = made == nullptr ? nullptr : runtime(made.get())->getFieldsToSerialize();
  std::printf("{\"scale\": %g}\n", kept == nullptr ? -1.0 : double(*static_cast<const float*>(kept->fields[0].data)));
}

void types(std::istringstream& words) {
  DataType in[7], out[2] = {};
  for (DataType& type : in) {
    int number;
    words >> number;
    type = static_cast<DataType>(number);
  }
  const auto made = create(1, TensorRTPhase::kBUILD);
  const int status = build(made.get())->getOutputDataTypes(out, 2, in, 7);
  std::printf("{\"status\": %d, \"types\": [%d, %d]}\n", status, int(out[0]), int(out[1]));
}

constexpr Problem GOOD = {2, 5, 2, 4, 64, 64, DataType::kBF16};

void shape(std::istringstream& words) {
  auto all = descs(GOOD);
  const auto made = create(1, TensorRTPhase::kRUNTIME);
  IPluginV3OneRuntime* plugin = runtime(made.get());
  EXPECT(plugin->onShapeChange(all.data(), 7, all.data() + 7, 2) == 0);
  int at;
  words >> at;
  for (int d = 0; d < 4; ++d) words >> all[at].dims.d[d];
  const int changed = plugin->onShapeChange(all.data(), 7, all.data() + 7, 2);
  int allocated = 0;
  const int queued = enqueue(plugin, GOOD, 1 << 24, nullptr, &allocated);
  std::printf("{\"changed\": %d, \"queued\": %d}\n", changed, queued);
}

void misaligned() {
  const auto all = descs(GOOD);
  const auto made = create(1, TensorRTPhase::kRUNTIME);
  int allocated = 0;
  EXPECT(runtime(made.get())->onShapeChange(all.data(), 7, all.data() + 7, 2) == 0);
  std::printf("{\"queued\": %d}\n", enqueue(runtime(made.get()), GOOD, 1 << 24, nullptr, &allocated, true));
}

void threads(std::istringstream& words) {
  int count;
  Problem p = GOOD;
  words >> count >> p.B >> p.T;
  const auto made = create(1, TensorRTPhase::kRUNTIME);
  std::atomic<int> good{0};
  std::vector<std::thread> all;
  for (int i = 0; i < count; ++i) {
    all.emplace_back([&] {
      std::unique_ptr<IPluginV3> own(runtime(made.get())->attachToContext(nullptr));
      const auto x = descs(p);
      for (int again = 0; again < 10; ++again) {
        int allocated = 0;
        const bool changed = runtime(own.get())->onShapeChange(x.data(), 7, x.data() + 7, 2) == 0;
        good += changed && enqueue(runtime(own.get()), p, 1 << 24, nullptr, &allocated) == 0 && allocated == 0;
      }
    });
  }
  for (std::thread& one : all) one.join();
  std::printf("{\"good\": %d}\n", good.load());
}

void context(std::istringstream& words) {
  unsigned long long id;
  words >> id;
  void* library = dlopen("libcuda.so.1", RTLD_NOW);
  EXPECT(library != nullptr);
  reinterpret_cast<void (*)(unsigned long long)>(dlsym(library, "record_context"))(id);
}

}  // namespace

int main(int, char** arguments) {
  void* library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) fail(dlerror());
  const auto set_finder = reinterpret_cast<void (*)(void*)>(dlsym(library, "setLoggerFinder"));
  const auto get = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
  EXPECT(set_finder != nullptr && get != nullptr);
  set_finder(nullptr);
  int32_t count = 0;
  IPluginCreatorInterface* const* all = get(count);
  EXPECT(count == 1 && std::strcmp(all[0]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0);
  creator = static_cast<IPluginCreatorV3One*>(all[0]);
  const PluginFieldCollection* fields = creator->getFieldNames();
  EXPECT(fields->nbFields == 1 && std::strcmp(fields->fields[0].name, "scale") == 0);
  std::printf("{\"creator\": [\"%s\", \"%s\", \"%s\"]}\n", creator->getPluginNamespace(), creator->getPluginName(),
              creator->getPluginVersion());
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::string command;
    words >> command;
    if (command == "run") run(words);
    if (command == "field") field(words);
    if (command == "types") types(words);
    if (command == "shape") shape(words);
    if (command == "misaligned") misaligned();
    if (command == "threads") threads(words);
    if (command == "context") context(words);
  }
  return 0;
}
