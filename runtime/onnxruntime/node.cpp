#include "node.h"

namespace gdn2::onnxruntime {
namespace {

constexpr const char* INPUT_NAMES[INPUTS] = {"q", "k", "v", "g", "b", "w", "initial_state"};

std::string text(const Shape& shape) {
  std::string list;
  for (size_t i = 0; i < shape.rank && i < RANK; ++i) list += (i ? ", " : "") + std::to_string(shape.sizes[i]);
  return "[" + list + (shape.rank > RANK ? ", ...]" : "]");
}

Status* refuse_shape(const Api* api, const std::string& expected, const Shape& got) {
  return refuse(api, "expected " + expected + ", got " + text(got));
}

Status* read_input(const Api* api, const ort::KernelContext* context, size_t index, Tensor& x) {
  const ort::Value* value = nullptr;
  if (Status* failed = ort::KernelContext_GetInput(api, context, index, &value)) return failed;
  ort::TensorTypeAndShapeInfo* info = nullptr;
  if (Status* failed = ort::GetTensorTypeAndShape(api, value, &info)) return failed;
  Status* failed = ort::GetDimensionsCount(api, info, &x.shape.rank);
  if (failed == nullptr) failed = ort::GetDimensions(api, info, x.shape.sizes, RANK);
  ort::ReleaseTensorTypeAndShapeInfo(api, info);
  if (failed != nullptr) return failed;
  return ort::GetTensorMutableData(api, const_cast<ort::Value*>(value), &x.data);
}

Status* new_output(const Api* api, ort::KernelContext* context, size_t index, const Shape& shape, void** data) {
  ort::Value* value = nullptr;
  Status* failed = ort::KernelContext_GetOutput(api, context, index, shape.sizes, shape.rank, &value);
  return failed != nullptr ? failed : ort::GetTensorMutableData(api, value, data);
}

}  // namespace

bool Shape::operator==(const Shape& other) const {
  bool same = rank == other.rank;
  for (size_t i = 0; same && i < rank && i < RANK; ++i) same = sizes[i] == other.sizes[i];
  return same;
}

Status* Inputs::read(const Api* api, const ort::KernelContext* context) {
  Tensor* const all[INPUTS] = {&q, &k, &v, &g, &b, &w, &state};
  for (size_t i = 0; i < INPUTS; ++i) {
    if (Status* failed = read_input(api, context, i, *all[i])) return failed;
  }
  if (q.shape.rank != RANK) return refuse_shape(api, "q of shape [B, T, H, K]", q.shape);
  if (v.shape.rank != RANK) return refuse_shape(api, "v of shape [B, T, HV, V]", v.shape);
  B = q.shape.sizes[0], T = q.shape.sizes[1], H = q.shape.sizes[2], K = q.shape.sizes[3];
  HV = v.shape.sizes[2], V = v.shape.sizes[3];
  const Shape keys = q.shape, values = {RANK, {B, T, HV, V}}, states = {RANK, {B, HV, K, V}};
  const Shape* const wanted[INPUTS] = {&keys, &keys, &values, &keys, &keys, &values, &states};
  for (size_t i = 0; i < INPUTS; ++i) {
    if (all[i]->shape == *wanted[i]) continue;
    return refuse_shape(api, std::string(INPUT_NAMES[i]) + " of shape " + text(*wanted[i]), all[i]->shape);
  }
  return nullptr;
}

Status* Outputs::make(const Api* api, ort::KernelContext* context, const Inputs& in) {
  Status* failed = new_output(api, context, 0, in.v.shape, &o);
  return failed != nullptr ? failed : new_output(api, context, FINAL_STATE, in.state.shape, &final_state);
}

Status* read_scale(const Api* api, const ort::KernelInfo* info, float* scale) {
  Status* failed = ort::KernelInfoGetAttribute_float(api, info, "scale", scale);
  if (failed == nullptr) return nullptr;
  ort::ReleaseStatus(api, failed);
  return refuse(api, "expected the attribute scale, a float, got a node without it");
}

Status* refuse(const Api* api, const std::string& what, ort::ErrorCode code) {
  const std::string text = std::string(DOMAIN) + "::" + NAME + ": " + what;
  return ort::CreateStatus(api, code, text.c_str());
}

}  // namespace gdn2::onnxruntime
