// Compiled by headers.py with the headers of a TensorRT: prints a line for everything that runtime/tensorrt declares
// otherwise, or how much is the same. Ours are in the namespace `ours` here, NVIDIA's in nvinfer1.
#define nvinfer1 ours
#include "../../runtime/tensorrt/host.cpp"
#undef nvinfer1

#include <NvInferRuntime.h>
#include <NvInferVersion.h>
#include <cxxabi.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <regex>
#include <type_traits>
#include <typeinfo>

namespace {

int same = 0, different = 0;

template <class Fact>
void compare(const std::string& what, const Fact& mine, const Fact& theirs) {
  if (mine == theirs) {
    ++same;
    return;
  }
  ++different;
  if constexpr (std::is_same_v<Fact, std::string>) {
    std::printf("%s: here %s, there %s\n", what.c_str(), mine.c_str(), theirs.c_str());
  } else {
    std::printf("%s: here %lld, there %lld\n", what.c_str(), (long long)(mine), (long long)(theirs));
  }
}

// In the C++ ABI of Linux a pointer to a virtual function is one more than its place in the table, in bytes.
template <class Function>
long slot(Function function) {
  static_assert(sizeof function == 2 * sizeof(ptrdiff_t));
  ptrdiff_t place;
  std::memcpy(&place, &function, sizeof place);
  return (place - 1) / long(sizeof(void*));
}

// Arguments and result, without namespaces, versions of them and the class. A stream is a pointer to something.
template <class Function>
std::string signature(Function) {
  char* text = abi::__cxa_demangle(typeid(Function).name(), nullptr, nullptr, nullptr);
  std::string found = text;
  std::free(text);
  found = std::regex_replace(found, std::regex("\\([^()]*::\\*\\)"), "");
  found = std::regex_replace(found, std::regex("(ours|nvinfer1|v_\\d_\\d)::"), "");
  return std::regex_replace(found, std::regex("CUstream_st\\*"), "void*");
}

// getInterfaceInfo() looks at no member.
template <class Interface>
std::string info() {
  alignas(16) static char nothing[64] = {};
  const auto found = reinterpret_cast<const Interface*>(nothing)->Interface::getInterfaceInfo();
  return std::string(found.kind) + " " + std::to_string(found.major) + "." + std::to_string(found.minor);
}

#define SIZE(type)                                                        \
  compare<size_t>("sizeof " #type, sizeof(ours::type), sizeof(nvinfer1::type)); \
  compare<size_t>("alignof " #type, alignof(ours::type), alignof(nvinfer1::type))
#define MEMBER(type, name)                                                                                   \
  compare<size_t>("offset of " #type "." #name, offsetof(ours::type, name), offsetof(nvinfer1::type, name)); \
  compare<size_t>("sizeof " #type "." #name, sizeof(ours::type::name), sizeof(nvinfer1::type::name))
#define VALUE(name) compare<int>(#name, int(ours::name), int(nvinfer1::name))
#define FUNCTION(type, name)                                                                  \
  compare<long>("slot of " #type "::" #name, slot(&ours::type::name), slot(&nvinfer1::type::name)); \
  compare(#type "::" #name, signature(&ours::type::name), signature(&nvinfer1::type::name))
#define INTERFACE(type) \
  SIZE(type);           \
  compare(#type, info<ours::type>(), info<nvinfer1::type>())

void compare_data() {
  SIZE(Dims), SIZE(PluginTensorDesc), SIZE(DynamicPluginTensorDesc), SIZE(PluginField), SIZE(PluginFieldCollection);
  SIZE(InterfaceInfo), SIZE(DimsExprs);
  MEMBER(Dims, nbDims), MEMBER(Dims, d);
  MEMBER(PluginTensorDesc, dims), MEMBER(PluginTensorDesc, type), MEMBER(PluginTensorDesc, format);
  MEMBER(PluginTensorDesc, scale);
  MEMBER(DynamicPluginTensorDesc, desc), MEMBER(DynamicPluginTensorDesc, min), MEMBER(DynamicPluginTensorDesc, max);
  MEMBER(DynamicPluginTensorDesc, opt);
  MEMBER(PluginField, name), MEMBER(PluginField, data), MEMBER(PluginField, type), MEMBER(PluginField, length);
  MEMBER(PluginFieldCollection, nbFields), MEMBER(PluginFieldCollection, fields);
  MEMBER(InterfaceInfo, kind), MEMBER(InterfaceInfo, major), MEMBER(InterfaceInfo, minor);
  MEMBER(DimsExprs, nbDims), MEMBER(DimsExprs, d);
  VALUE(DataType::kFLOAT), VALUE(DataType::kHALF), VALUE(DataType::kINT8), VALUE(DataType::kINT32);
  VALUE(DataType::kBF16), VALUE(DataType::kINT64), VALUE(TensorFormat::kLINEAR), VALUE(APILanguage::kCPP);
  VALUE(TensorRTPhase::kBUILD), VALUE(TensorRTPhase::kRUNTIME);
  VALUE(PluginCapabilityType::kCORE), VALUE(PluginCapabilityType::kBUILD), VALUE(PluginCapabilityType::kRUNTIME);
  VALUE(PluginFieldType::kFLOAT32), VALUE(PluginFieldType::kFLOAT64), VALUE(PluginFieldType::kINT32);
  VALUE(PluginFieldType::kUNKNOWN), VALUE(PluginFieldType::kINT64);
}

void compare_interfaces() {
  INTERFACE(IPluginV3), INTERFACE(IPluginV3OneCore), INTERFACE(IPluginV3OneBuildV2), INTERFACE(IPluginV3OneRuntime);
  INTERFACE(IPluginCreatorV3One);
  FUNCTION(IVersionedInterface, getAPILanguage), FUNCTION(IVersionedInterface, getInterfaceInfo);
  FUNCTION(IPluginV3, getCapabilityInterface), FUNCTION(IPluginV3, clone);
  FUNCTION(IPluginV3OneCore, getPluginName), FUNCTION(IPluginV3OneCore, getPluginVersion);
  FUNCTION(IPluginV3OneCore, getPluginNamespace);
  FUNCTION(IPluginV3OneBuildV2, configurePlugin), FUNCTION(IPluginV3OneBuildV2, getOutputDataTypes);
  FUNCTION(IPluginV3OneBuildV2, getOutputShapes), FUNCTION(IPluginV3OneBuildV2, supportsFormatCombination);
  FUNCTION(IPluginV3OneBuildV2, getNbOutputs), FUNCTION(IPluginV3OneBuildV2, getWorkspaceSize);
  FUNCTION(IPluginV3OneBuildV2, getValidTactics), FUNCTION(IPluginV3OneBuildV2, getNbTactics);
  FUNCTION(IPluginV3OneBuildV2, getTimingCacheID), FUNCTION(IPluginV3OneBuildV2, getFormatCombinationLimit);
  FUNCTION(IPluginV3OneBuildV2, getMetadataString), FUNCTION(IPluginV3OneBuildV2, getAliasedInput);
  FUNCTION(IPluginV3OneRuntime, setTactic), FUNCTION(IPluginV3OneRuntime, onShapeChange);
  FUNCTION(IPluginV3OneRuntime, enqueue), FUNCTION(IPluginV3OneRuntime, attachToContext);
  FUNCTION(IPluginV3OneRuntime, getFieldsToSerialize);
  FUNCTION(IPluginCreatorV3One, createPlugin), FUNCTION(IPluginCreatorV3One, getFieldNames);
  FUNCTION(IPluginCreatorV3One, getPluginName), FUNCTION(IPluginCreatorV3One, getPluginVersion);
  FUNCTION(IPluginCreatorV3One, getPluginNamespace);
}

// What host.cpp calls by slot: 10 and 11 differ here.
void compare_slots() {
  const gdn2::tensorrt::Slots& slots = NV_TENSORRT_MAJOR == 10 ? gdn2::tensorrt::TEN : gdn2::tensorrt::ELEVEN;
  using nvinfer1::IPluginRegistry, nvinfer1::IPluginCreatorInterface;
  using Register = bool (IPluginRegistry::*)(IPluginCreatorInterface&, const char*) noexcept;
  using Deregister = bool (IPluginRegistry::*)(const IPluginCreatorInterface&) noexcept;
  compare<long>("slot of ILoggerFinder::findLogger", slots.find_logger, slot(&nvinfer1::ILoggerFinder::findLogger));
  compare<long>("slot of ILogger::log", slots.log, slot(&nvinfer1::ILogger::log));
  compare<long>("slot of IPluginRegistry::registerCreator", slots.register_creator,
                slot(static_cast<Register>(&IPluginRegistry::registerCreator)));
  compare<long>("slot of IPluginRegistry::deregisterCreator", slots.deregister_creator,
                slot(static_cast<Deregister>(&IPluginRegistry::deregisterCreator)));
}

}  // namespace

int main() {
  compare_data();
  compare_interfaces();
  compare_slots();
  if (different == 0) {
    std::printf("TensorRT %d.%d: %d facts are the same\n", NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR, same);
  }
  return different != 0;
}
