// The node gdn2::GatedDeltaNet2 as every kernel of this library meets it: inputs read and checked, outputs made.
//
//   q k g b [B, T, H, K]   v w o [B, T, HV, V]   initial_state final_state [B, HV, K, V]   attribute scale
#pragma once

#include <string>

#include "abi.h"

namespace gdn2::onnxruntime {

using ort::Api, ort::Status;

constexpr char DOMAIN[] = "gdn2", NAME[] = "GatedDeltaNet2";
constexpr size_t INPUTS = 7, OUTPUTS = 2, G = 3, INITIAL_STATE = 6, FINAL_STATE = 1;
constexpr size_t RANK = 4;

// One for each provider and type of q.
struct Op : ort::CustomOp {
  ort::ElementType element;
};

struct Shape {
  size_t rank;
  int64_t sizes[RANK];  // of a higher rank the first ones

  bool operator==(const Shape& other) const;
};

struct Tensor {
  Shape shape;
  void* data;
};

struct Inputs {
  Tensor q, k, v, g, b, w, state;
  int64_t B, T, H, HV, K, V;

  // Refuses shapes that are not those above. Whether a kernel takes such heads is its own to say.
  Status* read(const Api* api, const ort::KernelContext* context);
};

struct Outputs {
  void *o, *final_state;

  Status* make(const Api* api, ort::KernelContext* context, const Inputs& in);
};

Status* read_scale(const Api* api, const ort::KernelInfo* info, float* scale);

// A status that says the node's name, then `what`.
Status* refuse(const Api* api, const std::string& what, ort::ErrorCode code = ort::INVALID_ARGUMENT);

// Creation, run and end of kernels on a provider, as members of the op.
void use_cpu(Op& op);
void use_cuda(Op& op);

}  // namespace gdn2::onnxruntime
