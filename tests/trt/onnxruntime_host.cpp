// Drives our ONNX Runtime library as ONNX Runtime does on CUDA, from a script on standard input, and prints one JSON
// object a line. Arguments: the library, the version of the runtime.
//
//   run B T H HV K V type scale ...     one run on the kernel of that type and scale; types: 0 float, 1 half, 7 bfloat16
//   aliased B T H HV K V type scale ... ... with final_state in the buffer of initial_state
//   shape i d0 d1 d2 d3                 a good problem with another input i
//   misaligned                          ... with k at no multiple of 16 bytes
//   unscaled                            a node without the attribute
//   threads n                           as many threads on one kernel, which step and run sequences by turns
//   end                                 the session ends: kernels are destroyed
//
// Device memory is host memory here: only a recording libcuda looks at it. A function of the interface that is not
// declared below ends the process.
#include <dlfcn.h>

#include <atomic>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "abi.h"

namespace ort {
struct Status {
  int code;
  std::string text;
};
struct CustomOpDomain {
  std::string name;
  std::vector<const CustomOp*> ops;
};
struct SessionOptions {
  std::vector<CustomOpDomain*> domains;
};
struct KernelInfo {
  const float* scale;
};
struct Value {
  std::vector<int64_t> sizes;
  void* data;
};
struct KernelContext {
  std::vector<Value> inputs;
  std::vector<void*> at;  // of the outputs
  std::vector<Value> outputs;
};
struct TensorTypeAndShapeInfo {
  std::vector<int64_t> sizes;
};
struct MemoryInfo {};
struct Allocator {
  MemoryInfo info;
};
}  // namespace ort

namespace {

using namespace ort;

void* const STREAM = reinterpret_cast<void*>(0x5);
std::atomic<int> allocators{0}, infos{0}, statuses{0};
std::mutex memory_mutex;
std::map<void*, size_t> taken;  // scratch buffers
size_t last_bytes;
void* last_memory;
bool quiet = false;

[[noreturn]] void fail(const char* what) {
  std::printf("{\"failed\": \"%s\"}\n", what);
  std::exit(1);
}
#define EXPECT(truth) \
  if (!(truth)) fail(#truth)

template <size_t INDEX>
void undeclared() {
  std::printf("{\"failed\": \"slot %zu\"}\n", INDEX);
  std::exit(1);
}

Api api = {};
ApiBase base = {};
const char* version;

template <size_t... INDEX>
void fill(std::index_sequence<INDEX...>) {
  ((api.slots[INDEX] = undeclared<INDEX>), ...);
}

template <size_t INDEX, class Function>
void declare(Slot<INDEX, Function>, Function* function) {
  api.slots[INDEX] = reinterpret_cast<void (*)()>(function);
}

void* allocate(size_t size) { return std::aligned_alloc(256, (size + 511) / 256 * 256); }

Status* bad(const char* text) { return ++statuses, new Status{1, text}; }

void declare_all() {
  fill(std::make_index_sequence<sizeof(api.slots) / sizeof(api.slots[0])>());
  declare(CreateStatus, +[](int code, const char* text) { return ++statuses, new Status{code, text}; });
  declare(ReleaseStatus, +[](Status* status) { --statuses, delete status; });
  declare(CreateCustomOpDomain, +[](const char* name, CustomOpDomain** domain) -> Status* {
    *domain = new CustomOpDomain{name, {}};
    return nullptr;
  });
  declare(CustomOpDomain_Add, +[](CustomOpDomain* domain, const CustomOp* op) -> Status* {
    domain->ops.push_back(op);
    return nullptr;
  });
  declare(AddCustomOpDomain, +[](SessionOptions* options, CustomOpDomain* domain) -> Status* {
    options->domains.push_back(domain);
    return nullptr;
  });
  declare(KernelInfoGetAttribute_float, +[](const KernelInfo* info, const char* name, float* value) -> Status* {
    if (info->scale == nullptr || std::string(name) != "scale") return bad("no such attribute");
    *value = *info->scale;
    return nullptr;
  });
  declare(KernelInfoGetAllocator, +[](const KernelInfo*, int type, Allocator** allocator) -> Status* {
    EXPECT(type == 0);
    ++allocators;
    *allocator = new Allocator;
    return nullptr;
  });
  declare(AllocatorGetInfo, +[](const Allocator* allocator, const MemoryInfo** info) -> Status* {
    *info = &allocator->info;
    return nullptr;
  });
  declare(ReleaseAllocator, +[](Allocator* allocator) { --allocators, delete allocator; });
  declare(KernelContext_GetInput, +[](const KernelContext* context, size_t i, const Value** value) -> Status* {
    *value = &context->inputs.at(i);
    return nullptr;
  });
  declare(KernelContext_GetOutput, +[](KernelContext* context, size_t i, const int64_t* sizes, size_t rank,
                                       Value** value) -> Status* {
    context->outputs.at(i) = {{sizes, sizes + rank}, context->at.at(i)};
    *value = &context->outputs[i];
    return nullptr;
  });
  declare(GetTensorTypeAndShape, +[](const Value* value, TensorTypeAndShapeInfo** info) -> Status* {
    ++infos;
    *info = new TensorTypeAndShapeInfo{value->sizes};
    return nullptr;
  });
  declare(ReleaseTensorTypeAndShapeInfo, +[](TensorTypeAndShapeInfo* info) { --infos, delete info; });
  declare(GetDimensionsCount, +[](const TensorTypeAndShapeInfo* info, size_t* rank) -> Status* {
    *rank = info->sizes.size();
    return nullptr;
  });
  declare(GetDimensions, +[](const TensorTypeAndShapeInfo* info, int64_t* sizes, size_t at_most) -> Status* {
    for (size_t i = 0; i < at_most && i < info->sizes.size(); ++i) sizes[i] = info->sizes[i];
    return nullptr;
  });
  declare(GetTensorMutableData, +[](Value* value, void** data) -> Status* {
    *data = value->data;
    return nullptr;
  });
  declare(KernelContext_GetScratchBuffer, +[](const KernelContext*, const MemoryInfo* info, size_t bytes,
                                              void** memory) -> Status* {
    EXPECT(info != nullptr && bytes > 0);
    const std::lock_guard<std::mutex> lock(memory_mutex);
    *memory = last_memory = allocate(bytes);
    taken[*memory] = last_bytes = bytes;
    return nullptr;
  });
  declare(AllocatorFree, +[](Allocator*, void* memory) -> Status* {
    const std::lock_guard<std::mutex> lock(memory_mutex);
    EXPECT(taken.erase(memory) == 1);
    std::free(memory);
    return nullptr;
  });
  declare(KernelContext_GetGPUComputeStream, +[](const KernelContext*, void** stream) -> Status* {
    if (!quiet) std::printf("{\"enqueue\": true}\n");
    *stream = STREAM;
    return nullptr;
  });
}

struct Problem {
  int64_t B, T, H, HV, K, V;
  int type;
  float scale;
};
const Problem GOOD = {2, 5, 2, 4, 64, 64, 7, 1};

CustomOpDomain* domain = nullptr;
struct Kernel {
  const CustomOp* op;
  float scale;
  void* made;
};
std::map<std::pair<int, float>, Kernel> kernels;

const CustomOp* cuda_op(int element) {
  for (const CustomOp* op : domain->ops) {
    if (std::string(op->GetExecutionProviderType(op)) == "CUDAExecutionProvider" && op->GetInputType(op, 0) == element) {
      return op;
    }
  }
  fail("no op");
}

int element_of(int type) { return type == 0 ? FLOAT : type == 1 ? FLOAT16 : BFLOAT16; }

std::string message(Status* status) {
  if (status == nullptr) return "";
  const std::string text = status->text;
  --statuses, delete status;
  return text;
}

// The kernel of a type and scale, made when it is first asked for.
std::string find_kernel(const Problem& p, Kernel& kernel) {
  const auto found = kernels.find({p.type, p.scale});
  if (found != kernels.end()) return kernel = found->second, "";
  kernel = {cuda_op(element_of(p.type)), p.scale, nullptr};
  const KernelInfo info = {&p.scale};
  const std::string wrong = message(kernel.op->CreateKernelV2(kernel.op, &api, &info, &kernel.made));
  if (wrong.empty()) kernels[{p.type, p.scale}] = kernel;
  return wrong;
}

struct Call {
  std::vector<void*> memory;  // of 7 inputs and 2 outputs
  KernelContext context;

  Call(const Problem& p, bool aliased) {
    const std::vector<int64_t> keys = {p.B, p.T, p.H, p.K}, values = {p.B, p.T, p.HV, p.V};
    const std::vector<int64_t> state = {p.B, p.HV, p.K, p.V};
    for (const auto& sizes : {keys, keys, values, keys, keys, values, state, values, state}) {
      size_t count = 1;
      for (int64_t size : sizes) count *= size_t(size);
      memory.push_back(allocate(count * 4));
      if (memory.size() <= 7) context.inputs.push_back({sizes, memory.back()});
    }
    context.at = {memory[7], memory[aliased ? 6 : 8]};
    context.outputs.resize(2);
  }
  ~Call() {
    for (void* one : memory) std::free(one);
  }
};

void run(const Problem& p, bool aliased, void (*change)(Call&, void*) = nullptr, void* with = nullptr) {
  Kernel kernel;
  std::string wrong = find_kernel(p, kernel);
  const bool created = wrong.empty();
  Call call(p, aliased);
  if (change != nullptr) change(call, with);
  last_bytes = 0, last_memory = nullptr;
  if (created) wrong = message(kernel.op->KernelComputeV2(kernel.made, &call.context));
  EXPECT(taken.empty() && infos == 0 && statuses == 0);
  std::printf("{\"created\": %s, \"wrong\": \"%s\", \"bytes\": %zu, \"shapes\": [", created ? "true" : "false",
              wrong.c_str(), last_bytes);
  for (size_t i = 0; i < 2; ++i) {
    std::printf("%s[", i == 0 ? "" : ", ");
    const auto& sizes = call.context.outputs[i].sizes;
    for (size_t d = 0; d < sizes.size(); ++d) std::printf("%s%" PRId64, d == 0 ? "" : ", ", sizes[d]);
    std::printf("]");
  }
  std::printf("], \"at\": [");
  for (const Value& x : call.context.inputs) std::printf("%" PRIuPTR ", ", reinterpret_cast<uintptr_t>(x.data));
  for (void* x : call.context.at) std::printf("%" PRIuPTR ", ", reinterpret_cast<uintptr_t>(x));
  std::printf("%" PRIuPTR "]}\n", reinterpret_cast<uintptr_t>(last_memory));
}

void threads(int count) {
  quiet = true;
  Kernel kernel;
  EXPECT(find_kernel(GOOD, kernel).empty());
  std::atomic<int> good{0};
  std::vector<std::thread> all;
  for (int i = 0; i < count; ++i) {
    all.emplace_back([&] {
      for (int again = 0; again < 10; ++again) {
        Problem p = GOOD;
        p.T = again % 2 == 0 ? 1 : 5;
        Call call(p, false);
        good += message(kernel.op->KernelComputeV2(kernel.made, &call.context)).empty();
      }
    });
  }
  for (std::thread& one : all) one.join();
  quiet = false;
  EXPECT(taken.empty() && infos == 0 && statuses == 0);
  std::printf("{\"good\": %d}\n", good.load());
}

void end() {
  for (const auto& [key, kernel] : kernels) kernel.op->KernelDestroy(kernel.made);
  kernels.clear();
  std::printf("{\"allocators\": %d}\n", allocators.load());
}

void execute(const std::string& command, std::istringstream& words) {
  if (command == "run" || command == "aliased") {
    Problem p;
    words >> p.B >> p.T >> p.H >> p.HV >> p.K >> p.V >> p.type >> p.scale;
    run(p, command == "aliased");
  } else if (command == "shape") {
    run(GOOD, false, [](Call& call, void* opaque) {
      std::istringstream& words = *static_cast<std::istringstream*>(opaque);
      size_t i;
      words >> i;
      for (int64_t& size : call.context.inputs.at(i).sizes) words >> size;
    }, &words);
  } else if (command == "misaligned") {
    run(GOOD, false, [](Call& call, void*) {
      call.context.inputs[1].data = static_cast<char*>(call.context.inputs[1].data) + 4;
    });
  } else if (command == "unscaled") {
    const CustomOp* op = cuda_op(FLOAT);
    const KernelInfo info = {nullptr};
    void* made = nullptr;
    std::printf("{\"wrong\": \"%s\"}\n", message(op->CreateKernelV2(op, &api, &info, &made)).c_str());
    EXPECT(made == nullptr && statuses == 0);
  } else if (command == "threads") {
    int count;
    words >> count;
    threads(count);
  } else if (command == "end") {
    end();
  } else {
    fail("an unknown command");
  }
}

}  // namespace

int main(int, char** arguments) {
  void* library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) fail(dlerror());
  version = arguments[2];
  declare_all();
  base = {[](uint32_t wanted) -> const Api* { return wanted == 17 ? &api : nullptr; }, [] { return version; }};
  const auto enter = reinterpret_cast<Status* (*)(SessionOptions*, const ApiBase*)>(dlsym(library, "RegisterCustomOps"));
  SessionOptions options, again;
  EXPECT(enter != nullptr && enter(&options, &base) == nullptr && enter(&again, &base) == nullptr);
  EXPECT(options.domains.size() == 1 && options.domains == again.domains);
  domain = options.domains[0];
  std::printf("{\"domain\": \"%s\", \"ops\": [", domain->name.c_str());
  for (size_t i = 0; i < domain->ops.size(); ++i) {
    const CustomOp* op = domain->ops[i];
    std::printf("%s[\"%s\", \"%s\", %d]", i == 0 ? "" : ", ", op->GetName(op), op->GetExecutionProviderType(op),
                op->GetInputType(op, 0));
  }
  std::printf("]}\n");
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::string command;
    words >> command;
    execute(command, words);
  }
  return 0;
}
