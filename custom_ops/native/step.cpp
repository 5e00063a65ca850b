// One token for each state. With S the old state, a = exp(g) and z = w*v, both reductions come from one pass over S:
//
//   r = S^T (a*b*k)     p = S^T (a*q)     u = z - r     o = scale * (p + (q.k) u)     S = a*S + k u^T
//
// A tile of V (STEP_VECS vectors of columns) is read twice: from memory for r and p, from cache for the update. Rows of another
// state_out are fetched with the first read, else the update would wait for each of them.
#include "simd.h"

namespace gdn2 {
namespace GDN2_ISA {
namespace {

struct Token {
  alignas(64) float a[MAX_HEAD];
  alignas(64) float k[MAX_HEAD];
  alignas(64) float erase[MAX_HEAD];  // a*b*k
  alignas(64) float read[MAX_HEAD];   // scale*a*q
  float read_k;                       // scale*(q.k)
};

struct Columns {
  const float* state_in;
  float* state_out;
  const float* z;
  float* o;
  int64_t K, V;  // V is the row stride
};

template <class T>
void load_token(Token& token, const Step& args, int64_t n, int64_t h) {
  const int64_t K = args.heads.K;
  const T* q = row<T>(args.q, n, 0, h * K);
  const T* k = row<T>(args.k, n, 0, h * K);
  const T* b = row<T>(args.b, n, 0, h * K);
  const float* g = row<float>(args.g, n, 0, h * K);
  const Vec scale = set(args.scale);
  Vec read_k = set(0.0f);
  for (int64_t d = 0; d < K; d += LANES) {
    const int64_t left = K - d;
    const Vec a = exp(load(g + d, left)), k_d = load(k + d, left), q_d = load(q + d, left) * scale;
    read_k = fma(q_d, k_d, read_k);
    store(token.a + d, a, left);
    store(token.k + d, k_d, left);
    store(token.erase + d, a * load(b + d, left) * k_d, left);
    store(token.read + d, a * q_d, left);
  }
  token.read_k = sum(read_k);
}

// NV vectors of columns; PARTIAL: the last of them has only `last` columns.
template <int NV, bool PARTIAL>
void step_tile(const Token& token, const Columns at, int64_t last) {
  const auto get = [last](const float* p, int c) {
    return PARTIAL && c == NV - 1 ? load(p + c * LANES, last) : load(p + c * LANES);
  };
  const auto put = [last](float* p, int c, Vec x) {
    if (PARTIAL && c == NV - 1) store(p + c * LANES, x, last);
    else store(p + c * LANES, x);
  };
  const int64_t K = at.K, V = at.V;
  const float* in = at.state_in;
  float* out = at.state_out;
  const bool fetch = in != out;
  Vec r[NV], p[NV], u[NV];
  for (int c = 0; c < NV; ++c) r[c] = p[c] = set(0.0f);
  for (int64_t d = 0; d < K; ++d) {
    const Vec erase = set(token.erase[d]), read = set(token.read[d]);
    for (int c = 0; c < NV; ++c) {
      if (fetch) __builtin_prefetch(out + d * V + c * LANES, 1, 2);
      const Vec s = once(get(in + d * V, c));
      r[c] = fma(erase, s, r[c]);
      p[c] = fma(read, s, p[c]);
    }
  }
  for (int c = 0; c < NV; ++c) u[c] = get(at.z, c) - r[c];
  for (int c = 0; c < NV; ++c) put(at.o, c, fma(set(token.read_k), u[c], p[c]));
  for (int64_t d = 0; d < K; ++d, in += V, out += V) {
    const Vec a = set(token.a[d]), k = set(token.k[d]);
    for (int c = 0; c < NV; ++c) put(out, c, fma(k, u[c], a * get(in, c)));
  }
}

template <int NV>
void step_tile_of(int64_t vecs, const Token& token, const Columns& at, int64_t last) {
  if constexpr (NV > 1) {
    if (vecs < NV) return step_tile_of<NV - 1>(vecs, token, at, last);
  }
  if (last < LANES) step_tile<NV, true>(token, at, last);
  else step_tile<NV, false>(token, at, last);
}

template <class T>
void step_columns(const Step& args, int64_t n, int64_t hv, int64_t v_begin, int64_t v_end) {
  const int64_t HV = args.heads.HV, K = args.heads.K, V = args.heads.V;
  Token token;
  load_token<T>(token, args, n, hv / (HV / args.heads.H));

  alignas(64) float z[MAX_HEAD], o[MAX_HEAD];
  const T* v = row<T>(args.v, n, 0, hv * V);
  const T* w = row<T>(args.w, n, 0, hv * V);
  for (int64_t c = v_begin; c < v_end; c += LANES) {
    store(z + c, load(v + c, v_end - c) * load(w + c, v_end - c), v_end - c);
  }

  const int64_t slot = args.slots == nullptr  ? n
                       : args.slot_bytes == 4 ? static_cast<const int32_t*>(args.slots)[n]
                                              : static_cast<const int64_t*>(args.slots)[n];
  const int64_t at_state = (slot * HV + hv) * K * V;
  for (int64_t c = v_begin; c < v_end; c += STEP_VECS * LANES) {
    const int64_t width = smaller(v_end - c, STEP_VECS * LANES), vecs = ceil_div(width, LANES);
    const Columns at = {args.state_in + at_state + c, args.state_out + at_state + c, z + c, o + c, K, V};
    step_tile_of<STEP_VECS>(vecs, token, at, width - (vecs - 1) * LANES);
  }
  T* out = static_cast<T*>(args.o) + (n * HV + hv) * V;
  for (int64_t c = v_begin; c < v_end; c += LANES) store(out + c, load(o + c, v_end - c), v_end - c);
}

}  // namespace

void step(const Step& args, int64_t n, int64_t hv, int64_t v_begin, int64_t v_end) {
  switch (args.type) {
    case Type::f32: return step_columns<float>(args, n, hv, v_begin, v_end);
    case Type::bf16: return step_columns<BFloat16>(args, n, hv, v_begin, v_end);
    case Type::f16: return step_columns<Float16>(args, n, hv, v_begin, v_end);
  }
}

}  // namespace GDN2_ISA
}  // namespace gdn2
