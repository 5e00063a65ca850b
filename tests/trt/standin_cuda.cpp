// A stand-in for libcuda.so.1 whose device memory is host memory, for programs that bring their own kernels: the work
// that the stand-in for tensorrt puts into a stream (standin_work).
//
// Stricter than a device: work waits until the stream is synchronised, new memory is all ones (NaN), and everything is
// refused that a driver may let pass: no context, addresses outside of what is allocated, waiting inside a capture.
// GDN2_DEVICES: how many there are, 1 when unset.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <vector>

namespace {

constexpr int INVALID_VALUE = 1, INVALID_CONTEXT = 201, INVALID_HANDLE = 400, ILLEGAL_ADDRESS = 700,
              CAPTURE_UNSUPPORTED = 900, LAUNCH_FAILED = 719;
using Work = std::function<int()>;

struct Stream {
  std::vector<Work> queue;
  std::vector<Work>* capture = nullptr;
};
using Graph = std::vector<Work>;

std::recursive_mutex mutex;
std::map<uint64_t, size_t> memory;
std::set<Stream*> streams;
std::set<Graph*> graphs, executables;
int context_object;
thread_local bool has_context = false;

bool inside(uint64_t address, size_t size) {
  auto found = memory.upper_bound(address);
  if (found == memory.begin()) return false;
  --found;
  return address + size <= found->first + found->second;
}

int put(void* handle, Work work) {
  auto* stream = static_cast<Stream*>(handle);
  if (!has_context) return INVALID_CONTEXT;
  if (streams.count(stream) == 0) return INVALID_HANDLE;
  (stream->capture != nullptr ? *stream->capture : stream->queue).push_back(std::move(work));
  return 0;
}

int drain(Stream* stream) {
  int status = 0;
  std::vector<Work> queue;
  queue.swap(stream->queue);
  for (Work& one : queue) {
    if (int failed = one()) status = failed;
  }
  return status;
}

Work copy(uint64_t to, uint64_t from, size_t size, bool to_device, bool from_device) {
  return [=] {
    if ((to_device && !inside(to, size)) || (from_device && !inside(from, size))) return ILLEGAL_ADDRESS;
    std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), size);
    return 0;
  };
}

}  // namespace

extern "C" {

#define LOCKED const std::lock_guard<std::recursive_mutex> lock(mutex)

// Of the stand-in for tensorrt: a call of `function` as work. Whether the stream is being captured. What is not freed.
int standin_work(void* stream, int (*function)(uint64_t), uint64_t argument) {
  LOCKED;
  return put(stream, [=] { return function(argument); });
}
int standin_capturing(void* stream) {
  LOCKED;
  return static_cast<Stream*>(stream)->capture != nullptr;
}
int standin_inside(uint64_t address, size_t size) {
  LOCKED;
  return inside(address, size);
}
uint64_t standin_live(int kind) {
  LOCKED;
  return kind == 0 ? memory.size() : kind == 1 ? streams.size() : graphs.size() + executables.size();
}

int cuInit(unsigned) { return 0; }
int cuDeviceGetCount(int* count) {
  const char* text = std::getenv("GDN2_DEVICES");
  return *count = text == nullptr ? 1 : std::atoi(text), 0;
}
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, ordinal == 0 ? 0 : INVALID_VALUE; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
  return *value = attribute == 75 ? 9 : 0, attribute != 75 && attribute != 76 ? INVALID_VALUE : 0;
}
int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = &context_object, device; }
int cuCtxSetCurrent(void* context) { return has_context = context == &context_object, 0; }
int cuGetErrorName(int status, const char** name) {
  *name = status == INVALID_CONTEXT ? "CUDA_ERROR_INVALID_CONTEXT"
          : status == ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS"
          : status == CAPTURE_UNSUPPORTED ? "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
          : status == LAUNCH_FAILED ? "CUDA_ERROR_LAUNCH_FAILED" : nullptr;
  return *name == nullptr ? INVALID_VALUE : 0;
}

int cuMemAlloc_v2(uint64_t* address, size_t size) {
  LOCKED;
  if (!has_context) return INVALID_CONTEXT;
  if (size == 0) return INVALID_VALUE;
  void* made = std::aligned_alloc(256, (size + 255) / 256 * 256);
  std::memset(made, 0xFF, size);
  *address = reinterpret_cast<uint64_t>(made);
  memory[*address] = size;
  return 0;
}
int cuMemFree_v2(uint64_t address) {
  LOCKED;
  if (memory.count(address) == 0) return INVALID_VALUE;
  for (Stream* stream : streams) drain(stream);  // as the driver, which waits
  memory.erase(address);
  std::free(reinterpret_cast<void*>(address));
  return 0;
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t size, void* stream) {
  LOCKED;
  return put(stream, copy(to, reinterpret_cast<uint64_t>(from), size, true, false));
}
int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t size, void* stream) {
  LOCKED;
  return put(stream, copy(reinterpret_cast<uint64_t>(to), from, size, false, true));
}
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t size, void* stream) {
  LOCKED;
  return put(stream, copy(to, from, size, true, true));
}
int cuMemsetD8Async(uint64_t to, unsigned char value, size_t size, void* stream) {
  LOCKED;
  return put(stream, [=] {
    if (!inside(to, size)) return ILLEGAL_ADDRESS;
    std::memset(reinterpret_cast<void*>(to), value, size);
    return 0;
  });
}

int cuStreamCreate(void** stream, unsigned) {
  LOCKED;
  if (!has_context) return INVALID_CONTEXT;
  auto* made = new Stream;
  streams.insert(made);
  return *stream = made, 0;
}
int cuStreamDestroy_v2(void* handle) {
  LOCKED;
  auto* stream = static_cast<Stream*>(handle);
  if (streams.erase(stream) == 0) return INVALID_HANDLE;
  drain(stream);
  delete stream;
  return 0;
}
int cuStreamSynchronize(void* handle) {
  LOCKED;
  auto* stream = static_cast<Stream*>(handle);
  if (!has_context) return INVALID_CONTEXT;
  if (streams.count(stream) == 0) return INVALID_HANDLE;
  return stream->capture != nullptr ? CAPTURE_UNSUPPORTED : drain(stream);
}
int cuStreamBeginCapture_v2(void* handle, int mode) {
  LOCKED;
  auto* stream = static_cast<Stream*>(handle);
  if (streams.count(stream) == 0 || stream->capture != nullptr || mode < 0 || mode > 2) return INVALID_VALUE;
  return stream->capture = new Graph, 0;
}
int cuStreamEndCapture(void* handle, void** graph) {
  LOCKED;
  auto* stream = static_cast<Stream*>(handle);
  if (stream->capture == nullptr) return INVALID_VALUE;
  graphs.insert(stream->capture);
  *graph = stream->capture;
  return stream->capture = nullptr, 0;
}
int cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long flags) {
  LOCKED;
  auto* of = static_cast<Graph*>(graph);
  if (graphs.count(of) == 0 || flags != 0) return INVALID_VALUE;
  auto* made = new Graph(*of);
  executables.insert(made);
  return *executable = made, 0;
}
int cuGraphDestroy(void* graph) {
  LOCKED;
  auto* of = static_cast<Graph*>(graph);
  if (graphs.erase(of) == 0) return INVALID_HANDLE;
  delete of;
  return 0;
}
int cuGraphLaunch(void* executable, void* stream) {
  LOCKED;
  auto* of = static_cast<Graph*>(executable);
  if (executables.count(of) == 0) return INVALID_HANDLE;
  for (const Work& one : *of) {
    if (int failed = put(stream, one)) return failed;
  }
  return 0;
}
int cuGraphExecDestroy(void* executable) {
  LOCKED;
  auto* of = static_cast<Graph*>(executable);
  if (executables.erase(of) == 0) return INVALID_HANDLE;
  delete of;
  return 0;
}
}
