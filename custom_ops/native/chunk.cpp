// Whole sequences for one value head: the recurrence, four tokens for each pass over the state.
//
// For a group of tokens 1..4, with S the state before it, P_i = a_1 .. a_i, e = b*k, kd_ij = a_{j+1} .. a_i k_j, z = w*v:
//
//   r_i = S^T (P_i e_i) + sum_{j<i}  (e_i.kd_ij) u_j          u_i = z_i - r_i
//   o_i = scale * (S^T (P_i q_i) + sum_{j<=i} (q_i.kd_ij) u_j)
//   S   = P_4 S + sum_j kd_4j u_j^T
//
// Products of decays only, no quotient: exact at any decay. The pass that updates S for one group forms the sums over the
// new S for the next: 13 operations and one load and store for 4 tokens, where token by token it is 16 and two.
// A short last group is filled with inert tokens (a = 1, the rest 0), so a token's bits do not depend on what follows it.
#include "ahead.h"
#include "simd.h"

namespace gdn2 {
namespace GDN2_ISA {
namespace {

constexpr int GROUP = 4;
constexpr int BLOCK = 8;  // groups prepared at once: their coefficients stay in the second-level cache
constexpr int TILE = CHUNK_VECS * LANES;
constexpr int ROW = MAX_HEAD + 16;  // off a power of two: the 13 streams of a pass fall in different cache sets

struct Group {
  float decay[ROW];         // P_4
  float write[GROUP][ROW];  // kd_4j
  float erase[GROUP][ROW];  // P_i e_i
  float read[GROUP][ROW];   // scale P_i q_i
  float erase_k[GROUP][GROUP], read_k[GROUP][GROUP];
};

template <class T>
void prepare(Group& group, const Sequences& in, int64_t batch, int64_t token, int64_t h, int64_t count) {
  const int64_t K = in.heads.K;
  const Vec scale = set(in.scale), zero = set(0.0f);
  Vec erase_k[GROUP][GROUP], read_k[GROUP][GROUP];
  for (int i = 0; i < GROUP; ++i) {
    for (int j = 0; j <= i; ++j) erase_k[i][j] = read_k[i][j] = zero;
  }
  for (int64_t d = 0; d < K; d += LANES) {
    const int64_t left = K - d, at = h * K + d;
    Vec decay = set(1.0f), kd[GROUP];
#pragma GCC unroll 4
    for (int i = 0; i < GROUP; ++i) {
      Vec a = set(1.0f), q = zero, e = zero;
      kd[i] = zero;
      if (i < count) {
        a = exp(load(row<float>(in.g, batch, token + i, at), left));
        q = load(row<T>(in.q, batch, token + i, at), left) * scale;
        kd[i] = load(row<T>(in.k, batch, token + i, at), left);
        e = load(row<T>(in.b, batch, token + i, at), left) * kd[i];
      }
      decay = decay * a;
      for (int j = 0; j < i; ++j) {
        kd[j] = kd[j] * a;
        erase_k[i][j] = fma(e, kd[j], erase_k[i][j]);
        read_k[i][j] = fma(q, kd[j], read_k[i][j]);
      }
      read_k[i][i] = fma(q, kd[i], read_k[i][i]);
      store(group.erase[i] + d, decay * e);
      store(group.read[i] + d, decay * q);
    }
    store(group.decay + d, decay);
    for (int j = 0; j < GROUP; ++j) store(group.write[j] + d, kd[j]);
  }
  for (int i = 0; i < GROUP; ++i) {
    for (int j = 0; j <= i; ++j) {
      group.erase_k[i][j] = sum(erase_k[i][j]);
      group.read_k[i][j] = sum(read_k[i][j]);
    }
  }
}

template <int NV>
struct Sums {
  Vec u[GROUP][NV], r[GROUP][NV], p[GROUP][NV];
};

// `done`: the group whose u is known and updates the state; `next`: the group whose r and p are wanted.
template <int NV, bool UPDATE, bool REDUCE>
GDN2_INLINE void pass(float* state_KV, int64_t K, const Group* done, const Group* next, Sums<NV>& sums) {
  Vec r[GROUP][NV], p[GROUP][NV];
  for (int i = 0; i < GROUP; ++i) {
    for (int c = 0; c < NV; ++c) r[i][c] = p[i][c] = set(0.0f);
  }
  for (int64_t d = 0; d < K; ++d, state_KV += NV * LANES) {
    Vec s[NV];
    for (int c = 0; c < NV; ++c) s[c] = load(state_KV + c * LANES);
    if (UPDATE) {
      const Vec decay = set(done->decay[d]);
      for (int c = 0; c < NV; ++c) s[c] = s[c] * decay;
#pragma GCC unroll 4
      for (int j = 0; j < GROUP; ++j) {
        const Vec write = set(done->write[j][d]);
        for (int c = 0; c < NV; ++c) s[c] = fma(write, sums.u[j][c], s[c]);
      }
      for (int c = 0; c < NV; ++c) store(state_KV + c * LANES, s[c]);
    }
    if (REDUCE) {
#pragma GCC unroll 4
      for (int i = 0; i < GROUP; ++i) {
        const Vec erase = set(next->erase[i][d]), read = set(next->read[i][d]);
        for (int c = 0; c < NV; ++c) {
          r[i][c] = fma(erase, s[c], r[i][c]);
          p[i][c] = fma(read, s[c], p[i][c]);
        }
      }
    }
  }
  for (int i = 0; i < GROUP; ++i) {
    for (int c = 0; c < NV; ++c) {
      sums.r[i][c] = r[i][c];
      sums.p[i][c] = p[i][c];
    }
  }
}

template <int NV>
GDN2_INLINE void solve(const Group& group, const float* z, float* o, int64_t stride, Sums<NV>& sums) {
#pragma GCC unroll 4
  for (int i = 0; i < GROUP; ++i) {
    for (int c = 0; c < NV; ++c) {
      Vec u = load(z + i * stride + c * LANES) - sums.r[i][c], o_c = sums.p[i][c];
      for (int j = 0; j < i; ++j) {
        u = fnma(set(group.erase_k[i][j]), sums.u[j][c], u);
        o_c = fma(set(group.read_k[i][j]), sums.u[j][c], o_c);
      }
      sums.u[i][c] = u;
      store(o + i * stride + c * LANES, fma(set(group.read_k[i][i]), u, o_c));
    }
  }
}

// A block of groups over one tile of columns.
template <int NV>
void run_tile(float* state_KV, int64_t K, const Group* groups, int64_t n_groups, const float* z, float* o, int64_t stride,
              Ahead& ahead) {
  Sums<NV> sums;
  pass<NV, false, true>(state_KV, K, nullptr, groups, sums);
  for (int64_t i = 0; i + 1 < n_groups; ++i) {
    ahead.fetch();
    solve<NV>(groups[i], z + i * GROUP * stride, o + i * GROUP * stride, stride, sums);
    pass<NV, true, true>(state_KV, K, groups + i, groups + i + 1, sums);
  }
  const int64_t last = n_groups - 1;
  solve<NV>(groups[last], z + last * GROUP * stride, o + last * GROUP * stride, stride, sums);
  pass<NV, true, false>(state_KV, K, groups + last, nullptr, sums);
}

// Tiles are contiguous [K, width] blocks, width TILE or, for the last one, the vectors it needs.
int64_t tile_width(int64_t columns, int64_t c) { return smaller(TILE, ceil_div(columns - c, LANES) * LANES); }

void load_state(float* tiles, const float* state, int64_t K, int64_t V, int64_t columns) {
  for (int64_t c = 0; c < columns; c += TILE) {
    const int64_t width = tile_width(columns, c);
    float* tile = tiles + c * K;
    for (int64_t d = 0; d < K; ++d) {
      for (int64_t i = 0; i < width; i += LANES) {
        store(tile + d * width + i, state == nullptr ? set(0.0f) : load(state + d * V + c + i, columns - c - i));
      }
    }
  }
}

void store_state(float* state, const float* tiles, int64_t K, int64_t V, int64_t columns) {
  for (int64_t c = 0; c < columns; c += TILE) {
    const int64_t width = tile_width(columns, c);
    const float* tile = tiles + c * K;
    for (int64_t d = 0; d < K; ++d) {
      for (int64_t i = 0; i < width; i += LANES) store(state + d * V + c + i, load(tile + d * width + i), columns - c - i);
    }
  }
}

void run_tiles(float* tiles, int64_t K, int64_t columns, const Group* groups, int64_t n_groups, const float* z, float* o,
               int64_t stride, Ahead& ahead) {
  for (int64_t c = 0; c < columns; c += TILE) {
    if (tile_width(columns, c) == TILE) run_tile<CHUNK_VECS>(tiles + c * K, K, groups, n_groups, z + c, o + c, stride, ahead);
    else run_tile<1>(tiles + c * K, K, groups, n_groups, z + c, o + c, stride, ahead);
  }
}

// The rows of the next block's tokens, fetched between the passes over this one.
template <class T>
void look_ahead(Ahead& ahead, const Chunk& args, const Span& at, int64_t token, int64_t h, int64_t at_v, int64_t columns) {
  const Sequences& in = args.in;
  const int64_t HV = in.heads.HV, K = in.heads.K, V = in.heads.V, next = at.token + token;
  ahead.begin(smaller(BLOCK * GROUP, at.length - token), (BLOCK - 1) * ceil_div(columns, TILE));
  ahead.add_rows<T>(in.q, at.batch, next, h * K, K);
  ahead.add_rows<T>(in.k, at.batch, next, h * K, K);
  ahead.add_rows<T>(in.b, at.batch, next, h * K, K);
  ahead.add_rows<float>(in.g, at.batch, next, h * K, K);
  ahead.add_rows<T>(in.v, at.batch, next, at_v, columns);
  ahead.add_rows<T>(in.w, at.batch, next, at_v, columns);
  ahead.add_rows<T>({args.o, in.T * HV * V, HV * V}, at.batch, next, at_v, columns);
}

template <class T>
bool chunk_columns(const Chunk& args, int64_t n, int64_t hv, int64_t v_begin, int64_t v_end) {
  const Sequences& in = args.in;
  const int64_t HV = in.heads.HV, K = in.heads.K, V = in.heads.V, h = hv / (HV / in.heads.H);
  const Span at = span(in, n);
  const int64_t columns = v_end - v_begin, stride = ceil_div(columns, COLUMNS) * COLUMNS, rows = BLOCK * GROUP;
  const int64_t at_state = (n * HV + hv) * K * V + v_begin;

  const Scratch state(K * stride), z(rows * stride), o(rows * stride), memory(BLOCK * sizeof(Group) / sizeof(float));
  if (state.data == nullptr || z.data == nullptr || o.data == nullptr || memory.data == nullptr) return false;
  Group* groups = reinterpret_cast<Group*>(memory.data);
  Ahead ahead;
  load_state(state.data, in.state == nullptr ? nullptr : in.state + at_state, K, V, columns);

  for (int64_t t = 0; t < at.length; t += rows) {
    const int64_t tokens = smaller(rows, at.length - t), n_groups = ceil_div(tokens, GROUP);
    for (int64_t i = 0; i < n_groups; ++i) {
      prepare<T>(groups[i], in, at.batch, at.token + t + i * GROUP, h, tokens - i * GROUP);
    }
    for (int64_t i = 0; i < n_groups * GROUP; ++i) {
      const T* v = row<T>(in.v, at.batch, at.token + t + i, hv * V + v_begin);
      const T* w = row<T>(in.w, at.batch, at.token + t + i, hv * V + v_begin);
      for (int64_t c = 0; c < stride; c += LANES) {
        const bool inside = i < tokens && c < columns;
        store(z.data + i * stride + c, inside ? load(v + c, columns - c) * load(w + c, columns - c) : set(0.0f));
      }
    }
    look_ahead<T>(ahead, args, at, t + tokens, h, hv * V + v_begin, columns);
    run_tiles(state.data, K, columns, groups, n_groups, z.data, o.data, stride, ahead);
    T* out = static_cast<T*>(args.o) + ((at.batch * in.T + at.token + t) * HV + hv) * V + v_begin;
    for (int64_t i = 0; i < tokens; ++i, out += HV * V) {
      for (int64_t c = 0; c < columns; c += LANES) store(out + c, load(o.data + i * stride + c), columns - c);
    }
  }
  if (args.state_out != nullptr) store_state(args.state_out + at_state, state.data, K, V, columns);
  return true;
}

}  // namespace

bool chunk(const Chunk& args, int64_t n, int64_t hv, int64_t v_begin, int64_t v_end) {
  switch (args.in.type) {
    case Type::f32: return chunk_columns<float>(args, n, hv, v_begin, v_end);
    case Type::bf16: return chunk_columns<BFloat16>(args, n, hv, v_begin, v_end);
    case Type::f16: return chunk_columns<Float16>(args, n, hv, v_begin, v_end);
  }
  return false;
}

}  // namespace GDN2_ISA
}  // namespace gdn2
