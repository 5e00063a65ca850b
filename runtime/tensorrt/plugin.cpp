// The node gdn2::GatedDeltaNet2 as a plugin of TensorRT, namespace gdn2, version 1: runtime/cuda behind IPluginV3.
//
//   q k g b [B, T, H, K]   v w o [B, T, HV, V]   initial_state final_state [B, HV, K, V]   field scale
//
// B and T are dynamic and may be 0. A network's types are taken as they are: q k v b w o share one of float, half and
// bfloat16; g and the states are float; all are linear. final_state may be bound to the memory of initial_state; that
// is not declared to TensorRT, which would copy a state for every layer. Whatever can fail does so when a network is
// built or a shape is set, with a message in the logger; enqueue launches kernels and does nothing else.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <new>

#include "abi.h"
#include "host.h"
#include "operators.h"

namespace {

using namespace nvinfer1;
using gdn2::cuda::Problem, gdn2::cuda::Type;

constexpr char NAMESPACE[] = "gdn2", NAME[] = "GatedDeltaNet2", VERSION[] = "1";
constexpr int32_t INPUTS = 7, OUTPUTS = 2, Q = 0, V = 2, G = 3, INITIAL_STATE = 6, RANK = 4;
constexpr const char* INPUT_NAMES[INPUTS] = {"q", "k", "v", "g", "b", "w", "initial_state"};

int32_t refuse(const std::string& what) {
  gdn2::tensorrt::report(std::string(NAMESPACE) + "::" + NAME + ": " + what);
  return -1;
}

bool type_of(DataType type, Type& found) {
  if (type != DataType::kFLOAT && type != DataType::kHALF && type != DataType::kBF16) return false;
  found = type == DataType::kFLOAT ? Type::f32 : type == DataType::kHALF ? Type::f16 : Type::bf16;
  return true;
}

const char* text(DataType type) {
  switch (type) {
    case DataType::kFLOAT: return "float";
    case DataType::kHALF: return "half";
    case DataType::kBF16: return "bfloat16";
    default: return "another";
  }
}

std::string text(const Dims& dims) {
  std::string list;
  for (int32_t i = 0; i < dims.nbDims && i < MAX_DIMS; ++i) list += (i ? ", " : "") + std::to_string(dims.d[i]);
  return "[" + list + "]";
}

std::string check_counts(int32_t inputs, int32_t outputs) {
  if (inputs == INPUTS && outputs == OUTPUTS) return {};
  return "expected 7 inputs and 2 outputs, got " + std::to_string(inputs) + " and " + std::to_string(outputs);
}

std::string check_types(const DataType* types) {
  Type of_q;
  if (!type_of(types[Q], of_q)) return std::string("expected q of type float, half or bfloat16, got ") + text(types[Q]);
  for (int32_t i = 0; i < INPUTS; ++i) {
    const DataType wanted = i == G || i == INITIAL_STATE ? DataType::kFLOAT : types[Q];
    if (types[i] == wanted) continue;
    return std::string("expected ") + INPUT_NAMES[i] + " of type " + text(wanted) + ", got " + text(types[i]);
  }
  return {};
}

// The problem of seven shapes; a dynamic dimension is -1 in all of them.
std::string read_problem(const PluginTensorDesc* in, Problem& problem) {
  for (int32_t i : {Q, V}) {
    if (in[i].dims.nbDims != RANK) {
      return std::string("expected ") + INPUT_NAMES[i] + " of four dimensions, got " + text(in[i].dims);
    }
  }
  const int64_t* const q = in[Q].dims.d;
  const int64_t* const v = in[V].dims.d;
  const Dims keys = in[Q].dims, values = {RANK, {q[0], q[1], v[2], v[3]}}, states = {RANK, {q[0], v[2], q[3], v[3]}};
  const Dims* const wanted[INPUTS] = {&keys, &keys, &values, &keys, &keys, &values, &states};
  DataType types[INPUTS];
  for (int32_t i = 0; i < INPUTS; ++i) {
    types[i] = in[i].type;
    bool same = in[i].dims.nbDims == RANK;
    for (int32_t d = 0; same && d < RANK; ++d) same = in[i].dims.d[d] == wanted[i]->d[d];
    if (same) continue;
    return std::string("expected ") + INPUT_NAMES[i] + " of shape " + text(*wanted[i]) + ", got " + text(in[i].dims);
  }
  const std::string wrong = check_types(types);
  problem = {q[0], q[1], q[2], v[2], q[3], v[3], Type::f32};
  if (wrong.empty()) type_of(types[Q], problem.type);
  return wrong;
}

// Of the largest shapes of a profile. B and T that TensorRT does not know yet are -1, and taken as none.
std::string read_largest(const DynamicPluginTensorDesc* in, Problem& problem) {
  PluginTensorDesc largest[INPUTS];
  for (int32_t i = 0; i < INPUTS; ++i) {
    largest[i] = in[i].desc;
    largest[i].dims = in[i].max;
  }
  const std::string wrong = read_problem(largest, problem);
  problem.B = std::max<int64_t>(problem.B, 0), problem.T = std::max<int64_t>(problem.T, 0);
  return wrong;
}

class Plugin final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuildV2, public IPluginV3OneRuntime {
 public:
  explicit Plugin(float scale) : scale_(scale) {}
  Plugin(const Plugin& other)  // what serialisation points to stays each one's own
      : IPluginV3(), IPluginV3OneCore(), IPluginV3OneBuildV2(), IPluginV3OneRuntime(),
        scale_(other.scale_), loaded_(other.loaded_) {}

  IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
    switch (type) {
      case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
      case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuildV2*>(this);
      case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }
  IPluginV3* clone() noexcept override { return new (std::nothrow) Plugin(*this); }

  const char* getPluginName() const noexcept override { return NAME; }
  const char* getPluginVersion() const noexcept override { return VERSION; }
  const char* getPluginNamespace() const noexcept override { return NAMESPACE; }

  // When a network is built.

  int32_t getNbOutputs() const noexcept override { return OUTPUTS; }

  int32_t getOutputDataTypes(DataType* out, int32_t out_count, const DataType* in,
                             int32_t in_count) const noexcept override {
    std::string wrong = check_counts(in_count, out_count);
    if (wrong.empty()) wrong = check_types(in);
    if (!wrong.empty()) return refuse(wrong);
    out[0] = in[V], out[1] = in[INITIAL_STATE];
    return 0;
  }

  int32_t getOutputShapes(const DimsExprs* in, int32_t in_count, const DimsExprs*, int32_t, DimsExprs* out,
                          int32_t out_count, IExprBuilder&) noexcept override {
    const std::string wrong = check_counts(in_count, out_count);
    if (!wrong.empty()) return refuse(wrong);
    out[0] = in[V], out[1] = in[INITIAL_STATE];
    return 0;
  }

  bool supportsFormatCombination(int32_t at, const DynamicPluginTensorDesc* in_out, int32_t in_count,
                                 int32_t) noexcept override {
    const PluginTensorDesc& one = in_out[at].desc;
    Type type;
    const bool is_float = at == G || at == INITIAL_STATE || at == in_count + 1;
    if (in_count != INPUTS || one.format != TensorFormat::kLINEAR || !type_of(one.type, type)) return false;
    return is_float ? one.type == DataType::kFLOAT : one.type == in_out[Q].desc.type;
  }

  int32_t configurePlugin(const DynamicPluginTensorDesc* in, int32_t in_count, const DynamicPluginTensorDesc*,
                          int32_t out_count) noexcept override {
    std::string wrong = check_counts(in_count, out_count);
    Problem largest = {};
    if (wrong.empty()) wrong = read_largest(in, largest);
    if (!wrong.empty()) return refuse(wrong);
    wrong = gdn2::cuda::check(largest);
    return wrong.empty() ? 0 : refuse(wrong);
  }

  // TensorRT asks after configurePlugin: the shapes have passed.
  size_t getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t, const DynamicPluginTensorDesc*,
                          int32_t) const noexcept override {
    Problem largest = {};
    const std::string wrong = read_largest(in, largest);
    if (wrong.empty()) return gdn2::cuda::workspace_bytes(largest);
    refuse(wrong);
    return 0;
  }

  const char* getTimingCacheID() noexcept override { return gdn2::cuda::table().digest; }

  // When an engine runs.

  int32_t onShapeChange(const PluginTensorDesc* in, int32_t in_count, const PluginTensorDesc*,
                        int32_t out_count) noexcept override {
    Problem problem = {};
    std::string wrong = check_counts(in_count, out_count);
    if (wrong.empty()) wrong = read_problem(in, problem);
    if (wrong.empty()) wrong = loaded_.load(problem);
    if (wrong.empty()) return 0;
    loaded_ = {};  // the shape before this one is not launched again
    return refuse(wrong);
  }

  int32_t enqueue(const PluginTensorDesc*, const PluginTensorDesc*, const void* const* in, void* const* out,
                  void* workspace, void* stream) noexcept override {
    const std::string wrong =
        loaded_.run({in[0], in[1], in[2], in[3], in[4], in[5], in[6], out[0], out[1]}, scale_, workspace, stream);
    return wrong.empty() ? 0 : refuse(wrong);
  }

  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }

  const PluginFieldCollection* getFieldsToSerialize() noexcept override {
    field_ = {"scale", &scale_, PluginFieldType::kFLOAT32, 1};
    fields_ = {1, &field_};
    return &fields_;
  }

 private:
  float scale_;
  gdn2::cuda::Operator loaded_;
  PluginField field_ = {};
  PluginFieldCollection fields_ = {};
};

// An ONNX attribute written without a point arrives as an integer.
std::string read_scale(const PluginFieldCollection* fields, float& scale) {
  bool found = false;
  for (int32_t i = 0; fields != nullptr && i < fields->nbFields; ++i) {
    const PluginField& field = fields->fields[i];
    if (std::strcmp(field.name, "scale") != 0) return std::string("expected the field scale alone, got ") + field.name;
    if (field.data == nullptr || field.length != 1) return "expected one number for the field scale, got others";
    switch (field.type) {
      case PluginFieldType::kFLOAT32: scale = *static_cast<const float*>(field.data); break;
      case PluginFieldType::kFLOAT64: scale = static_cast<float>(*static_cast<const double*>(field.data)); break;
      case PluginFieldType::kINT32: scale = static_cast<float>(*static_cast<const int32_t*>(field.data)); break;
      case PluginFieldType::kINT64: scale = static_cast<float>(*static_cast<const int64_t*>(field.data)); break;
      default: return "expected a number for the field scale, got type " + std::to_string(static_cast<int>(field.type));
    }
    found = true;
  }
  if (!found) return "expected the field scale, a float, got a node without it";
  return std::isfinite(scale) ? "" : "expected a finite field scale, got " + std::to_string(scale);
}

class Creator final : public IPluginCreatorV3One {
 public:
  const char* getPluginName() const noexcept override { return NAME; }
  const char* getPluginVersion() const noexcept override { return VERSION; }
  const char* getPluginNamespace() const noexcept override { return NAMESPACE; }
  const PluginFieldCollection* getFieldNames() noexcept override { return &fields_; }

  IPluginV3* createPlugin(const char*, const PluginFieldCollection* fields, TensorRTPhase) noexcept override {
    float scale = 0;
    const std::string wrong = read_scale(fields, scale);
    if (wrong.empty()) return new (std::nothrow) Plugin(scale);
    refuse(wrong);
    return nullptr;
  }

 private:
  PluginField field_ = {"scale", nullptr, PluginFieldType::kFLOAT32, 1};
  PluginFieldCollection fields_ = {1, &field_};
};

Creator creator;

// Loaded by dlopen alone (Triton Inference Server, polygraphy, trtexec --staticPlugins) the library registers itself.
// Where loadLibrary asks for the creators later, they are handed over: TensorRT refuses to have one twice.
struct Registration {
  std::mutex mutex;
  bool own;

  Registration() : own(gdn2::tensorrt::register_creator(&creator, NAMESPACE)) {}

  void hand_over() {
    const std::lock_guard<std::mutex> lock(mutex);
    if (own) gdn2::tensorrt::deregister_creator(&creator);
    own = false;
  }
} registration;

}  // namespace

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(void* finder) {
  gdn2::tensorrt::use_logger_finder(finder);
}

extern "C" __attribute__((visibility("default"))) IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static IPluginCreatorInterface* const all[] = {&creator};
  registration.hand_over();
  count = 1;
  return all;
}
