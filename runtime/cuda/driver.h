// The CUDA driver as these libraries use it: looked up when it is first needed, so that they load, list what they hold
// and size their workspaces on a machine without one. No header of CUDA, nothing of NVIDIA's is linked.
#pragma once

#include <cstdint>
#include <string>

namespace gdn2::cuda {

using Result = int;  // CUresult: 0 is success

// Names of cuda.h without the prefix cu; handles are pointers there too, and a device is an int.
struct Driver {
  Result (*CtxGetCurrent)(void** context);
  Result (*CtxGetId)(void* context, unsigned long long* id);
  Result (*CtxGetDevice)(int* device);
  Result (*DeviceGetAttribute)(int* value, int attribute, int device);
  Result (*ModuleLoadData)(void** module, const void* image);
  Result (*ModuleGetFunction)(void** function, void* module, const char* symbol);
  Result (*FuncSetAttribute)(void* function, int attribute, int value);
  Result (*LaunchKernel)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                         unsigned block_y, unsigned block_z, unsigned shared_memory, void* stream, void** parameters,
                         void** extra);
  Result (*GetErrorName)(Result result, const char** name);
};

constexpr int COMPUTE_CAPABILITY_MAJOR = 75, COMPUTE_CAPABILITY_MINOR = 76;  // CUdevice_attribute
constexpr int MAX_DYNAMIC_SHARED_MEMORY = 8;                                 // CUfunction_attribute
constexpr unsigned SHARED_MEMORY_OF_EVERY_KERNEL = 48 << 10;                 // more is asked for

// The driver that the dynamic linker finds as libcuda.so.1, or null and why there is none. Found once for the process.
const Driver* driver(std::string& why);

// "cuModuleLoadData: CUDA_ERROR_NO_BINARY_FOR_GPU".
std::string failure(const Driver& driver, const char* function, Result result);

}  // namespace gdn2::cuda
