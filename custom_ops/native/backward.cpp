// Vector-Jacobian product of chunk, in chunks of C = CHUNK tokens. Per chunk, with S the state before it, z = w*v, e = b*k,
// kd_ij = a_{j+1} .. a_i k_j, gamma_i = a_1 .. a_i (keys.h):
//
//   T_ij = e_i.kd_ij (j < i)      Q_ij = q_i.kd_ij (j <= i)      E = gamma*e      W_j = kd_Cj
//   R = (I + T)^-1 (Z - E S)      O = scale * ((gamma*q) S + Q R)      S_C = Diag(gamma_C) S + W^T R
//
// and, with P = scale * dO:
//
//   dR = Q^T P + W dS_C           dX = (I + T)^-T dR      dw = dX*v      dv = dX*w
//   dS = (gamma*q)^T P + Diag(gamma_C) dS_C - E^T dX
//   d(gamma*q) = P S^T      d(-E) = dX S^T      dW = R dS_C^T      dgamma_C = rowsum(dS_C * S)
//   dQ = tril(P R^T)        dT = -tril(dX R^T, -1)
//
// A lane owns PART columns of one value head; it keeps its states of a segment of the sequence and runs the chunks backwards.
// What sums over V comes out as one Partial for each lane and chunk; backward_chunk_keys adds them and finishes q k g b.
#include "keys.h"

namespace gdn2 {
namespace GDN2_ISA {
namespace {

constexpr int64_t SEGMENT = 128;  // chunks whose states are kept; a longer sequence is recomputed from segment to segment

struct Lane {
  int64_t hv, v, width, N;  // value head, first column, columns, columns padded to vectors
  float* states;            // [SEGMENT + 1, K_padded, N]
  float* solved;            // R [SEGMENT, CHUNK, N]
  float* checkpoints;       // [segments, K_padded, N]
  float* d_state;           // [K_padded, N]
};

// Buffers of one lane and chunk, shared by all lanes of a task.
struct Work {
  float* rows;      // P, then dX: [2 CHUNK, N]
  float* rows_t;    // [N, 2 CHUNK]
  float* solved_t;  // [N, CHUNK]
  float* key_sums;  // of backward_chunk_keys; null where it is left to backward_keys
};

struct Task {
  const ChunkBackward& args;
  int64_t n, h;
  Span at;
  int64_t K_padded, chunks;
  Keys& keys;
  Scores* scores;  // [SEGMENT]
  Work work;
  Ahead& ahead;

  int64_t count(int64_t i_chunk) const { return smaller(CHUNK, at.length - i_chunk * CHUNK); }
  int64_t token(int64_t i_chunk) const { return at.token + i_chunk * CHUNK; }
};

Lane make_lane(const Heads& heads, int64_t h, int64_t i_lane) {
  const int64_t parts = ceil_div(heads.V, PART), v = i_lane % parts * PART, width = smaller(PART, heads.V - v);
  return {h * (heads.HV / heads.H) + i_lane / parts, v, width, ceil_div(width, COLUMNS) * COLUMNS,
          nullptr, nullptr, nullptr, nullptr};
}

void load_state(const Task& task, const Lane& lane, const float* state, float* out) {
  const int64_t K = task.args.in.heads.K, V = task.args.in.heads.V;
  if (state != nullptr) state += (task.n * task.args.in.heads.HV + lane.hv) * K * V + lane.v;
  for (int64_t d = 0; d < task.K_padded; ++d) {
    for (int64_t c = 0; c < lane.N; c += LANES) {
      const bool inside = state != nullptr && d < K && c < lane.width;
      store(out + d * lane.N + c, inside ? load(state + d * V + c, lane.width - c) : set(0.0f));
    }
  }
}

void store_state(const Task& task, const Lane& lane, const float* state, float* out) {
  const int64_t K = task.args.in.heads.K, V = task.args.in.heads.V;
  out += (task.n * task.args.in.heads.HV + lane.hv) * K * V + lane.v;
  for (int64_t d = 0; d < K; ++d) {
    for (int64_t c = 0; c < lane.width; c += LANES) store(out + d * V + c, load(state + d * lane.N + c), lane.width - c);
  }
}

// R of the chunk, and the state after it from the state before it.
template <class T>
void forward_chunk(const Task& task, const Lane& lane, int64_t i_chunk, int64_t at_segment) {
  const Sequences& in = task.args.in;
  const int64_t N = lane.N, count = task.count(i_chunk), at_v = lane.hv * in.heads.V + lane.v;
  float* solved = lane.solved + at_segment * CHUNK * N;
  float* state = lane.states + at_segment * task.K_padded * N;
  for (int64_t i = 0; i < CHUNK; ++i) {
    for (int64_t c = 0; c < N; c += LANES) {
      Vec z = set(0.0f);
      if (i < count && c < lane.width) {
        z = load(row<T>(in.v, task.at.batch, task.token(i_chunk) + i, at_v + c), lane.width - c) *
            load(row<T>(in.w, task.at.batch, task.token(i_chunk) + i, at_v + c), lane.width - c);
      }
      store(solved + i * N + c, z);
    }
  }
  const Left minus_erase = {task.keys.read_erase[CHUNK], ROW, 1}, write_t = {task.keys.write_CK[0], 1, ROW};
  product<Start::add>(task.ahead, CHUNK, N, task.K_padded, minus_erase, state, N, solved, nullptr, solved, N);
  solve_lower(task.scores[at_segment].t_CC, solved, N);
  product<Start::scaled>(task.ahead, task.K_padded, N, CHUNK, write_t, solved, N, state, task.keys.decay_K,
                         state + task.K_padded * N, N);
}

// Gradients of v and w of the chunk, the lane's partial, and d_state carried from after the chunk to before it.
template <class T>
void backward_chunk_lane(const Task& task, const Lane& lane, int64_t i_chunk, int64_t at_segment, float* partial) {
  const Sequences& in = task.args.in;
  const int64_t N = lane.N, K = task.K_padded, V = in.heads.V, count = task.count(i_chunk), at_v = lane.hv * V + lane.v;
  const float* state = lane.states + at_segment * K * N;
  const float* solved = lane.solved + at_segment * CHUNK * N;
  const Scores& scores = task.scores[at_segment];
  float *p = task.work.rows, *dx = p + CHUNK * N;

  const Vec scale = set(in.scale);
  for (int64_t i = 0; i < CHUNK; ++i) {
    for (int64_t c = 0; c < N; c += LANES) {
      const bool inside = i < count && c < lane.width;
      const T* d_o = row<T>(task.args.do_, task.at.batch, task.token(i_chunk) + smaller(i, count - 1), at_v + c);
      store(p + i * N + c, inside ? load(d_o, lane.width - c) * scale : set(0.0f));
    }
  }
  transposed_lower_times(scores.read_CC, p, dx, N);
  product<Start::add>(task.ahead, CHUNK, N, K, {task.keys.write_CK[0], ROW, 1}, lane.d_state, N, dx, nullptr, dx, N);
  solve_upper(scores.t_CC, dx, N);

  const int64_t at_out = ((task.at.batch * in.T + task.token(i_chunk)) * in.heads.HV) * V + at_v;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t c = 0; c < lane.width; c += LANES) {
      const int64_t left = lane.width - c, at = at_out + i * in.heads.HV * V + c;
      const Vec dz = load(dx + i * N + c);
      const Vec v = load(row<T>(in.v, task.at.batch, task.token(i_chunk) + i, at_v + c), left);
      const Vec w = load(row<T>(in.w, task.at.batch, task.token(i_chunk) + i, at_v + c), left);
      store(static_cast<T*>(task.args.dv) + at, dz * w, left);
      store(static_cast<T*>(task.args.dw) + at, dz * v, left);
    }
  }

  const Partial out(partial, K);
  transpose(2 * CHUNK, N, p, N, task.work.rows_t, 2 * CHUNK);
  transpose(CHUNK, N, solved, N, task.work.solved_t, CHUNK);
  const float *rows_t = task.work.rows_t, *solved_t = task.work.solved_t;
  product<Start::zero>(task.ahead, K, 2 * CHUNK, N, {state, N, 1, true}, rows_t, 2 * CHUNK,
                       nullptr, nullptr, out.d_read_erase, 2 * CHUNK);
  product<Start::zero>(task.ahead, K, CHUNK, N, {lane.d_state, N, 1}, solved_t, CHUNK, nullptr, nullptr, out.d_write, CHUNK);
  product<Start::zero>(task.ahead, 2 * CHUNK, CHUNK, N, {p, N, 1}, solved_t, CHUNK, nullptr, nullptr, out.d_scores, CHUNK);
  for (int64_t d = 0; d < K; ++d) {
    Vec sums = set(0.0f);
    for (int64_t c = 0; c < N; c += LANES) sums = fma(load(state + d * N + c), load(lane.d_state + d * N + c), sums);
    out.d_decay[d] = sum(sums);
  }
  product<Start::scaled>(task.ahead, K, N, 2 * CHUNK, {task.keys.read_erase[0], 1, ROW}, p, N, lane.d_state, task.keys.decay_K,
                         lane.d_state, N);
}

// What the chunk reads, and with `backward` writes: fetched while the one before it is computed.
template <class T>
void look_ahead(const Task& task, const Lane* lanes, int64_t n_lanes, int64_t i_chunk, bool backward) {
  const Sequences& in = task.args.in;
  const int64_t H = in.heads.H, HV = in.heads.HV, K = in.heads.K, V = in.heads.V, k_size = H * K, v_size = HV * V;
  const int64_t batch = task.at.batch, at_k = task.h * K, at_v = lanes[0].hv * V + lanes[0].v;
  int64_t width = 0, calls = 0;  // lanes of a task lie side by side
  for (int64_t i = 0; i < n_lanes; ++i) {
    const int64_t N = lanes[i].N;
    width += lanes[i].width;
    calls += panels(CHUNK, N) + panels(task.K_padded, N);
    if (backward) calls += panels(task.K_padded, 2 * CHUNK) + panels(task.K_padded, CHUNK) + panels(2 * CHUNK, CHUNK);
  }
  const bool inside = 0 <= i_chunk && i_chunk < task.chunks;
  const int64_t token = inside ? task.token(i_chunk) : 0;
  task.ahead.begin(inside ? task.count(i_chunk) : 0, calls);
  const auto add_keys = [&](const View& x) { task.ahead.add_rows<T>(x, batch, token, at_k, K); };
  const auto add_values = [&](const View& x) { task.ahead.add_rows<T>(x, batch, token, at_v, width); };
  add_keys(in.q), add_keys(in.k), add_keys(in.b), add_values(in.v), add_values(in.w);
  task.ahead.add_rows<float>(in.g, batch, token, at_k, K);
  if (!backward) return;
  const ChunkBackward& out = task.args;
  add_values(out.do_);
  add_keys({out.dq, in.T * k_size, k_size}), add_keys({out.dk, in.T * k_size, k_size});
  add_keys({out.db, in.T * k_size, k_size});
  add_values({out.dv, in.T * v_size, v_size}), add_values({out.dw, in.T * v_size, v_size});
  task.ahead.add_rows<float>({out.dg, in.T * k_size, k_size}, batch, token, at_k, K);
}

// States and R of a segment, from the state in its first slot; the last slot ends up with the state after it.
template <class T>
void forward_segment(const Task& task, const Lane* lanes, int64_t n_lanes, int64_t i_segment) {
  const int64_t first = i_segment * SEGMENT, end = smaller(first + SEGMENT, task.chunks);
  for (int64_t i = 0; i < n_lanes; ++i) {
    const int64_t size = task.K_padded * lanes[i].N;
    std::memcpy(lanes[i].states, lanes[i].checkpoints + i_segment * size, static_cast<size_t>(size) * sizeof(float));
  }
  for (int64_t i_chunk = first; i_chunk < end; ++i_chunk) {
    load_keys<T>(task.keys, task.args.in, task.at.batch, task.token(i_chunk), task.h, task.count(i_chunk));
    score_keys(task.scores[i_chunk - first], task.keys, task.K_padded);
    look_ahead<T>(task, lanes, n_lanes, i_chunk + 1, false);
    for (int64_t i = 0; i < n_lanes; ++i) forward_chunk<T>(task, lanes[i], i_chunk, i_chunk - first);
  }
}

template <class T>
void backward_segment(const Task& task, const Lane* lanes, int64_t n_lanes, int64_t i_segment, float* partials, bool finish) {
  const Heads& heads = task.args.in.heads;
  const int64_t first = i_segment * SEGMENT, end = smaller(first + SEGMENT, task.chunks), floats = partial_floats(heads);
  for (int64_t i_chunk = end - 1; i_chunk >= first; --i_chunk) {
    load_keys<T>(task.keys, task.args.in, task.at.batch, task.token(i_chunk), task.h, task.count(i_chunk));
    look_ahead<T>(task, lanes, n_lanes, i_chunk - 1, true);
    float* at = partials + (finish ? 0 : i_chunk * lanes_of(heads) * floats);
    for (int64_t i = 0; i < n_lanes; ++i) backward_chunk_lane<T>(task, lanes[i], i_chunk, i_chunk - first, at + i * floats);
    if (finish) {
      const int64_t at_out = ((task.at.batch * task.args.in.T + task.token(i_chunk)) * heads.H + task.h) * heads.K;
      backward_chunk_keys<T>(task.args, task.keys, at_out, task.count(i_chunk), partials, task.work.key_sums);
    }
  }
}

template <class T>
bool backward_task(const ChunkBackward& args, int64_t n, int64_t h, int64_t lane_begin, int64_t lane_end, float* partials) {
  const Heads& heads = args.in.heads;
  const int64_t K = ceil_div(heads.K, COLUMNS) * COLUMNS, n_lanes = lane_end - lane_begin, floats = partial_floats(heads);
  const Span at = span(args.in, n);
  const int64_t chunks = ceil_div(at.length, CHUNK), kept = smaller(chunks, SEGMENT);
  const int64_t segments = chunks == 0 ? 1 : ceil_div(chunks, SEGMENT);
  const bool finish = partials == nullptr;

  int64_t columns = 0;
  for (int64_t i = lane_begin; i < lane_end; ++i) columns += make_lane(heads, h, i).N;
  const Scratch state_memory(columns * ((kept + 1 + segments + 1) * K + kept * CHUNK));
  const Scratch chunk_memory((static_cast<int64_t>(sizeof(Keys)) + kept * static_cast<int64_t>(sizeof(Scores))) / 4 +
                             5 * CHUNK * PART + (finish ? n_lanes * floats + key_sums_floats(heads) : 0));
  const Scratch lane_memory(n_lanes * static_cast<int64_t>(sizeof(Lane)) / 4);
  if (state_memory.data == nullptr || chunk_memory.data == nullptr || lane_memory.data == nullptr) return false;

  Keys& keys = *reinterpret_cast<Keys*>(chunk_memory.data);
  Scores* scores = reinterpret_cast<Scores*>(&keys + 1);
  float* rows = reinterpret_cast<float*>(scores + kept);
  float* const at_partials = finish ? rows + 5 * CHUNK * PART : partials + lane_begin * floats;
  float* const key_sums = finish ? at_partials + n_lanes * floats : nullptr;
  const Work work = {rows, rows + 2 * CHUNK * PART, rows + 4 * CHUNK * PART, key_sums};
  Ahead ahead;
  const Task task = {args, n, h, at, K, chunks, keys, scores, work, ahead};

  Lane* lanes = reinterpret_cast<Lane*>(lane_memory.data);
  float* memory = state_memory.data;
  for (int64_t i = 0; i < n_lanes; ++i) {
    Lane& lane = lanes[i] = make_lane(heads, h, lane_begin + i);
    lane.states = memory;
    lane.solved = lane.states + (kept + 1) * K * lane.N;
    lane.checkpoints = lane.solved + kept * CHUNK * lane.N;
    lane.d_state = lane.checkpoints + segments * K * lane.N;
    memory = lane.d_state + K * lane.N;
    load_state(task, lane, args.in.state, lane.checkpoints);
    load_state(task, lane, args.dstate, lane.d_state);
  }
  for (int64_t s = 0; s < segments; ++s) {
    forward_segment<T>(task, lanes, n_lanes, s);
    for (int64_t i = 0; s + 1 < segments && i < n_lanes; ++i) {
      const int64_t size = K * lanes[i].N;
      const float* end_state = lanes[i].states + SEGMENT * size;
      std::memcpy(lanes[i].checkpoints + (s + 1) * size, end_state, static_cast<size_t>(size) * sizeof(float));
    }
  }
  for (int64_t s = segments - 1; s >= 0; --s) {
    if (s + 1 < segments) forward_segment<T>(task, lanes, n_lanes, s);
    backward_segment<T>(task, lanes, n_lanes, s, at_partials, finish);
  }
  for (int64_t i = 0; args.dstate_in != nullptr && i < n_lanes; ++i) {
    store_state(task, lanes[i], lanes[i].d_state, args.dstate_in);
  }
  return true;
}

template <class T>
bool backward_keys_task(const ChunkBackward& args, int64_t n, int64_t h, int64_t i_chunk, const float* partials) {
  const Heads& heads = args.in.heads;
  const Span at = span(args.in, n);
  const int64_t count = smaller(CHUNK, at.length - i_chunk * CHUNK), token = at.token + i_chunk * CHUNK;
  const Scratch memory(static_cast<int64_t>(sizeof(Keys) / sizeof(float)) + key_sums_floats(heads));
  if (memory.data == nullptr) return false;
  Keys& keys = *reinterpret_cast<Keys*>(memory.data);
  load_keys<T>(keys, args.in, at.batch, token, h, count);
  backward_chunk_keys<T>(args, keys, ((at.batch * args.in.T + token) * heads.H + h) * heads.K, count,
                         partials + i_chunk * lanes_of(heads) * partial_floats(heads), reinterpret_cast<float*>(&keys + 1));
  return true;
}

}  // namespace

bool backward_lanes(const ChunkBackward& args, int64_t n, int64_t h, int64_t lane_begin, int64_t lane_end, float* partials) {
  switch (args.in.type) {
    case Type::f32: return backward_task<float>(args, n, h, lane_begin, lane_end, partials);
    case Type::bf16: return backward_task<BFloat16>(args, n, h, lane_begin, lane_end, partials);
    case Type::f16: return backward_task<Float16>(args, n, h, lane_begin, lane_end, partials);
  }
  return false;
}

bool backward_keys(const ChunkBackward& args, int64_t n, int64_t h, int64_t i_chunk, const float* partials) {
  switch (args.in.type) {
    case Type::f32: return backward_keys_task<float>(args, n, h, i_chunk, partials);
    case Type::bf16: return backward_keys_task<BFloat16>(args, n, h, i_chunk, partials);
    case Type::f16: return backward_keys_task<Float16>(args, n, h, i_chunk, partials);
  }
  return false;
}

}  // namespace GDN2_ISA
}  // namespace gdn2
