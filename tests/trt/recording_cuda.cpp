// A stand-in for libcuda.so.1 without a device: prints, one JSON object a line, what is loaded and launched. Parameters
// are read by the table of the cubin itself (.nv.info of the kernel), so what is printed is what the kernel would see.
//
// GDN2_ARCH: the compute capability, 90 when unset. GDN2_RECORD: a folder; images are written there as they are loaded.
// record_context(id) sets the id of the calling thread's context; 0 is none.
#include <elf.h>

#include <algorithm>
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

namespace {

struct Module {
  int index, arch;
  std::string symbol;
  std::vector<int> sizes;  // of the parameters, in order
};

struct Function {
  const Module* module;
  unsigned shared_memory;  // at most
};

std::mutex mutex;
std::vector<Module*> modules;
thread_local unsigned long long context_id = 1;

int device_arch() {
  const char* text = std::getenv("GDN2_ARCH");
  return text == nullptr ? 90 : std::atoi(text);
}

// Where an ELF file ends: its section headers, program headers or the last section.
size_t end_of(const unsigned char* image) {
  Elf64_Ehdr header;
  std::memcpy(&header, image, sizeof header);
  size_t end = header.e_shoff + size_t(header.e_shnum) * header.e_shentsize;
  end = std::max(end, size_t(header.e_phoff) + size_t(header.e_phnum) * header.e_phentsize);
  for (int i = 0; i < header.e_shnum; ++i) {
    Elf64_Shdr section;
    std::memcpy(&section, image + header.e_shoff + i * sizeof section, sizeof section);
    if (section.sh_type != SHT_NOBITS) end = std::max(end, size_t(section.sh_offset + section.sh_size));
  }
  return end;
}

// The entries of .nv.info: format, attribute, then two bytes of value or of size. KPARAM_INFO (0x17) holds an index,
// the ordinal, the offset, and flags with the size from bit 18 on.
void read_parameters(const unsigned char* at, const unsigned char* end, std::vector<int>& sizes) {
  while (at < end) {
    uint16_t size;
    std::memcpy(&size, at + 2, 2);
    const bool has_bytes = at[0] == 4;
    if (has_bytes && at[1] == 0x17) {
      uint16_t ordinal;
      uint32_t flags;
      std::memcpy(&ordinal, at + 8, 2);
      std::memcpy(&flags, at + 12, 4);
      if (sizes.size() <= ordinal) sizes.resize(ordinal + 1);
      sizes[ordinal] = int(flags >> 18);
    }
    at += 4 + (has_bytes ? size : 0);
  }
}

}  // namespace

extern "C" {

void record_context(unsigned long long id) { context_id = id; }

int cuCtxGetCurrent(void** context) {
  *context = context_id == 0 ? nullptr : reinterpret_cast<void*>(0x1000);  // an address may come again, an id may not
  return 0;
}
int cuCtxGetId(void*, unsigned long long* id) { return *id = context_id, 0; }
int cuCtxGetDevice(int* device) { return *device = 0, 0; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == 75 ? device_arch() / 10 : attribute == 76 ? device_arch() % 10 : -1;
  return 0;
}
int cuGetErrorName(int result, const char** name) {
  *name = result == 209 ? "CUDA_ERROR_NO_BINARY_FOR_GPU" : result == 1 ? "CUDA_ERROR_INVALID_VALUE" : nullptr;
  return *name == nullptr;
}

int cuModuleLoadData(void** module, const unsigned char* image) {
  if (std::memcmp(image, ELFMAG, SELFMAG) != 0) return 209;
  Elf64_Ehdr header;
  std::memcpy(&header, image, sizeof header);
  const auto* sections = reinterpret_cast<const Elf64_Shdr*>(image + header.e_shoff);
  const char* names = reinterpret_cast<const char*>(image) + sections[header.e_shstrndx].sh_offset;
  auto* made = new Module{};
  for (int i = 0; i < header.e_shnum; ++i) {
    const char* name = names + sections[i].sh_name;
    if (std::strncmp(name, ".nv.info.", 9) != 0) continue;
    made->symbol = name + 9;
    const unsigned char* begin = image + sections[i].sh_offset;
    read_parameters(begin, begin + sections[i].sh_size, made->sizes);
  }
  const std::lock_guard<std::mutex> lock(mutex);
  made->index = int(modules.size());
  modules.push_back(made);
  const std::string path = std::string(std::getenv("GDN2_RECORD")) + "/" + std::to_string(made->index) + ".cubin";
  FILE* file = std::fopen(path.c_str(), "wb");
  if (file == nullptr || std::fwrite(image, 1, end_of(image), file) != end_of(image)) std::abort();
  std::fclose(file);
  std::printf("{\"loaded\": %d, \"symbol\": \"%s\", \"context\": %llu}\n", made->index, made->symbol.c_str(),
              context_id);
  *module = made;
  return 0;
}

int cuModuleGetFunction(void** function, void* module, const char* symbol) {
  auto* of = static_cast<Module*>(module);
  if (of->symbol != symbol) return 500;
  *function = new Function{of, 48 << 10};
  return 0;
}

int cuFuncSetAttribute(Function* function, int attribute, int value) {
  if (attribute == 8) function->shared_memory = unsigned(value);
  return 0;
}

// No allocation here: the host counts those of enqueue.
int cuLaunchKernel(Function* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared_memory, void* stream, void** parameters, void** extra) {
  if (shared_memory > function->shared_memory || gx == 0 || extra != nullptr) return 1;
  const std::lock_guard<std::mutex> lock(mutex);
  std::printf("{\"image\": %d, \"grid\": [%u, %u, %u], \"block\": [%u, %u, %u], \"shared\": %u, \"stream\": %" PRIuPTR
              ", \"parameters\": [",
              function->module->index, gx, gy, gz, bx, by, bz, shared_memory, reinterpret_cast<uintptr_t>(stream));
  for (size_t i = 0; i < function->module->sizes.size(); ++i) {
    uint64_t value = 0;
    std::memcpy(&value, parameters[i], size_t(function->module->sizes[i]));
    std::printf("%s[%d, %" PRIu64 "]", i == 0 ? "" : ", ", function->module->sizes[i], value);
  }
  std::printf("]}\n");
  return 0;
}
}
