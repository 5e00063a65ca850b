// GDN-2 on a GPU from cubins: what gdn2_ops/kernels/{step,chunk_forward}.py launch, in C++.
//
//   S_t = (I - k_t (b_t*k_t)^T) Diag(exp g_t) S_{t-1} + k_t (w_t*v_t)^T        o_t = scale * S_t^T q_t
//
// q k g b [B, T, H, K]   v w o [B, T, HV, V]   state final_state [B, HV, K, V]   contiguous, in the device's memory.
// q k v b w o share one type, g and the states are fp32. T = 1 is the kernel `step`, other T are `prepare` and `recur`,
// with `summarise` and `chain` between them where few heads have many chunks. Both states may be the same memory. No
// framework is known here: runtime/tensorrt and runtime/onnxruntime are adapters. Functions return what went wrong, and
// nothing when nothing did.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels.h"

namespace gdn2::cuda {

enum class Type : int { f32, bf16, f16 };

struct Problem {
  int64_t B, T, H, HV, K, V;
  Type type;

  bool operator==(const Problem& other) const;
};

struct Tensors {
  const void *q, *k, *v, *g, *b, *w, *state;
  void *o, *final_state;
};

// Whether the sizes are ones that kernels exist for, and their cubins are at hand for some architecture.
std::string check(const Problem& problem);

// Enough for every problem whose B and T are not above those of `largest`, whatever the architecture.
size_t workspace_bytes(const Problem& largest);

// Where the parts of the workspace begin, in bytes; `end` is their sum.
struct Workspace {
  size_t e, qd, kx, ax, decay, m, f, end;
};

// The launches of one problem. Copies share what is loaded.
class Operator {
 public:
  // Chooses the kernels and loads them for the device of the current context: all that can fail for want of anything.
  std::string load(const Problem& problem);

  bool is_loaded() const { return count_ > 0; }

  // Of this problem alone, on the device it is loaded for.
  size_t workspace_bytes() const { return at_.end; }

  // Puts the launches into the stream. No allocation, no synchronisation, no loading: fit for stream capture.
  std::string run(const Tensors& tensors, float scale, void* workspace, void* stream) const;

 private:
  static constexpr int MOST = 4;
  std::string add(const std::string& key, bool in_segments = false);

  Sizes sizes_ = {};
  Workspace at_ = {};
  Launch launches_[MOST] = {};
  bool in_segments_[MOST] = {};  // starts from the states before each segment, which `chain` puts where f was
  int count_ = 0;
};

}  // namespace gdn2::cuda
