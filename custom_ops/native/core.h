// GDN-2 operators on the CPU: raw pointers in, raw pointers out, no framework.
//
//   S_t = (I - k_t (b_t*k_t)^T) Diag(exp g_t) S_{t-1} + k_t (w_t*v_t)^T        o_t = scale * S_t^T q_t
//
// per sequence and value head hv; key head h = hv / (HV / H). S [K, V] is fp32, so is all arithmetic.
//
//   step            one token for each of N states
//   chunk           whole sequences: one-pass recurrence, four tokens for each pass over the state
//   chunk_backward  vector-Jacobian product of chunk; recomputes, so it takes the inputs of chunk only
//
// Shapes: q k g b [B, T, H, K], v w o [B, T, HV, V], state [N, HV, K, V]. q k v b w o share one type, g and state are fp32.
// Preconditions, checked by the caller: 1 <= K, V <= MAX_HEAD; HV a multiple of H; [heads, channels] contiguous; outputs
// contiguous, 4-byte aligned and overlapping no input (but for the states, as written below).
// Numbers do not depend on the number of threads nor on the batch. No exception leaves these functions. chunk and
// chunk_backward allocate scratch, and return false where there is no memory for it: their outputs are then unfinished.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gdn2 {

constexpr int64_t MAX_HEAD = 256;

enum class Type : int { f32, bf16, f16 };
enum class Isa : int { portable, avx2, avx512 };  // avx2: with FMA and F16C; avx512: F, BW, VL, DQ

// The best instruction set of this machine is chosen at load time. set_isa is for tests: false if the machine lacks it.
Isa isa();
bool set_isa(Isa isa);

// The caller's threads. run must call body(closure, i) once for each 0 <= i < tasks, in any order and on any thread,
// and return when all calls have. A thread that gets the same run of consecutive tasks on every call finds its states in its
// cache. run == nullptr: this thread does everything.
struct ThreadPool {
  void (*run)(void* context, int64_t tasks, void (*body)(void* closure, int64_t task), void* closure);
  void* context;
  int threads;
};

// A tensor [B, T, heads, channels] with its last two axes contiguous; strides in elements. step ignores `token`.
struct View {
  const void* data;
  int64_t batch;
  int64_t token;
};

struct Heads {
  int64_t H, HV, K, V;
};

// What chunk and chunk_backward share. cu_seqlens [N + 1], or null: then N == B and every sequence has T tokens.
// With cu_seqlens B is 1, sequence n owns tokens cu_seqlens[n] to cu_seqlens[n + 1] and may be empty.
struct Sequences {
  Heads heads;
  int64_t N, T;
  const int64_t* cu_seqlens;
  Type type;
  float scale;
  View q, k, v, g, b, w;
  const float* state;  // [N, HV, K, V] before the first token; null: zeros
};

struct Chunk {
  Sequences in;
  void* o;           // [B, T, HV, V], type of q
  float* state_out;  // [N, HV, K, V], may be in.state; null: not wanted
};

struct ChunkBackward {
  Sequences in;
  View do_;             // [B, T, HV, V], type of q
  const float* dstate;  // [N, HV, K, V] gradient of state_out; null: zeros
  void *dq, *dk, *dv;   // shapes and types of the inputs; dq dk dg db are sums over the value heads of a key head
  float* dg;
  void *db, *dw;
  float* dstate_in;  // [N, HV, K, V], may be dstate; null: not wanted
};

// One token: q k g b [N, H, K], v w o [N, HV, V]; the `batch` stride of a View is its row stride.
// state_in and state_out may be the same memory. With slots, row n reads and writes state slots[n] of a pool
// [P, HV, K, V]; slots of one call are distinct.
struct Step {
  Heads heads;
  int64_t N;
  Type type;
  float scale;
  View q, k, v, g, b, w;
  const float* state_in;
  float* state_out;
  const void* slots;  // int32 or int64 [N]; null: row n is state n
  int slot_bytes;     // 4 or 8
  void* o;
};

void step(const Step& args, const ThreadPool& pool);
[[nodiscard]] bool chunk(const Chunk& args, const ThreadPool& pool);
[[nodiscard]] bool chunk_backward(const ChunkBackward& args, const ThreadPool& pool);

}  // namespace gdn2
