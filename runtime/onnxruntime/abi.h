// The part of ONNX Runtime's C interface that this library uses, declared here so that building needs no header of it.
//
// OrtApi is a table of functions that only ever grows at its end, so a function is its place in the table. Names are
// those of onnxruntime_c_api.h without the prefix Ort. A null Status is success. Calling convention: not of Windows.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

constexpr uint32_t API_VERSION = 17;  // the oldest with KernelContext_ParallelFor
constexpr int CUDA_API_VERSION = 18;    // the oldest with the last two functions, which kernels on CUDA need

struct Status;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct TensorTypeAndShapeInfo;
struct Allocator;
struct MemoryInfo;

enum ErrorCode : int { FAIL = 1, INVALID_ARGUMENT = 2 };
enum ElementType : int { FLOAT = 1, FLOAT16 = 10, BFLOAT16 = 16 };
enum MemoryType : int { DEFAULT = 0 };
enum Characteristic : int { REQUIRED = 0 };

struct Api {
  void (*slots[279])();  // as many as are looked at; the runtime has more
};

struct ApiBase {
  const Api* (*GetApi)(uint32_t version);  // null where the runtime is older than `version`
  const char* (*GetVersionString)();
};

// A function of the table, called with the table before its own arguments.
template <size_t INDEX, class Function>
struct Slot;

template <size_t INDEX, class Result, class... Arguments>
struct Slot<INDEX, Result(Arguments...)> {
  Result operator()(const Api* api, Arguments... arguments) const {
    static_assert(INDEX < sizeof(Api) / sizeof(void*), "not declared in Api");
    return reinterpret_cast<Result (*)(Arguments...)>(api->slots[INDEX])(arguments...);
  }
};

// clang-format off
constexpr Slot<  0, Status*(int code, const char* message)> CreateStatus;
constexpr Slot< 26, Status*(const char* name, CustomOpDomain** domain)> CreateCustomOpDomain;
constexpr Slot< 27, Status*(CustomOpDomain* domain, const struct CustomOp* op)> CustomOpDomain_Add;
constexpr Slot< 28, Status*(SessionOptions* options, CustomOpDomain* domain)> AddCustomOpDomain;
constexpr Slot< 51, Status*(Value* value, void** data)> GetTensorMutableData;
constexpr Slot< 61, Status*(const TensorTypeAndShapeInfo* info, size_t* rank)> GetDimensionsCount;
constexpr Slot< 62, Status*(const TensorTypeAndShapeInfo* info, int64_t* sizes, size_t at_most)> GetDimensions;
constexpr Slot< 65, Status*(const Value* value, TensorTypeAndShapeInfo** info)> GetTensorTypeAndShape;
constexpr Slot< 76, Status*(Allocator* allocator, void* memory)> AllocatorFree;
constexpr Slot< 77, Status*(const Allocator* allocator, const MemoryInfo** info)> AllocatorGetInfo;
constexpr Slot< 85, Status*(const KernelInfo* info, const char* name, float* value)> KernelInfoGetAttribute_float;
constexpr Slot< 90, Status*(const KernelContext* context, size_t index, const Value** value)> KernelContext_GetInput;
constexpr Slot< 91, Status*(KernelContext* context, size_t index, const int64_t* sizes, size_t rank, Value** value)>
    KernelContext_GetOutput;
constexpr Slot< 93, void(Status* status)> ReleaseStatus;
constexpr Slot< 99, void(TensorTypeAndShapeInfo* info)> ReleaseTensorTypeAndShapeInfo;
constexpr Slot<101, void(CustomOpDomain* domain)> ReleaseCustomOpDomain;
constexpr Slot<132, void(Allocator* allocator)> ReleaseAllocator;
constexpr Slot<193, Status*(const KernelContext* context, void** stream)> KernelContext_GetGPUComputeStream;
constexpr Slot<274, Status*(const KernelContext* context, void (*body)(void* closure, size_t task), size_t tasks,
                            size_t batches, void* closure)>
    KernelContext_ParallelFor;
constexpr Slot<277, Status*(const KernelContext* context, const MemoryInfo* info, size_t bytes, void** memory)>
    KernelContext_GetScratchBuffer;
constexpr Slot<278, Status*(const KernelInfo* info, int memory_type, Allocator** allocator)> KernelInfoGetAllocator;
// clang-format on

// OrtCustomOp. A runtime reads no further than what `version` had: members marked with a later one may be left null.
struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const Api*, const KernelInfo*);  // null: CreateKernelV2 is asked
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  int (*GetInputType)(const CustomOp*, size_t index);
  size_t (*GetInputTypeCount)(const CustomOp*);
  int (*GetOutputType)(const CustomOp*, size_t index);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void* kernel, KernelContext*);  // null: KernelComputeV2 is asked
  void (*KernelDestroy)(void* kernel);
  int (*GetInputCharacteristic)(const CustomOp*, size_t index);
  int (*GetOutputCharacteristic)(const CustomOp*, size_t index);
  int (*GetInputMemoryType)(const CustomOp*, size_t index);
  int (*GetVariadicInputMinArity)(const CustomOp*);  // these four: for variadic parameters only
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  Status* (*CreateKernelV2)(const CustomOp*, const Api*, const KernelInfo*, void** kernel);
  Status* (*KernelComputeV2)(void* kernel, KernelContext*);
  Status* (*InferOutputShapeFn)(const CustomOp*, void* context);  // null: shapes are known when the node has run
  int (*GetStartVersion)(const CustomOp*);  // null: 1
  int (*GetEndVersion)(const CustomOp*);    // null: none
  size_t (*GetMayInplace)(int** inputs, int** outputs);  // 18
  void (*ReleaseMayInplace)(int* inputs, int* outputs);  // 18
  size_t (*GetAliasMap)(int** inputs, int** outputs);    // 18
  void (*ReleaseAliasMap)(int* inputs, int* outputs);    // 18
};

}  // namespace ort
