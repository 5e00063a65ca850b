// One token for each state. With S the old state, a = exp(g) and z = w*v, both reductions come from one pass over S:
//
//   r = S^T (a*b*k)     p = S^T (a*q)     u = z - r     o = scale * (p + (q.k) u)     S = a*S + k u^T
//
// A state is walked in tiles of V, each twice: for r and p, and for the update. The update of one tile and the sums of the
// next go row by row together, so that arithmetic and memory are busy at the same time. The update walks back, rows and
// columns: what was read last is still in the first-level cache, and a processor foresees addresses that only fall as well
// as those that only rise, but no mixture. A tile is STEP_VECS vectors wide, whose sums fit the registers; where states come
// from far, and on some processors always, it has 128 columns, a row of most models in one piece (decisions 0014, 0015).
#include "simd.h"

namespace gdn2 {
namespace GDN2_ISA {
namespace {

constexpr int64_t ROWS_AHEAD = 8;      // of the tile that is summed: far enough to come from memory in time
constexpr int FAR_VECS = 128 / LANES;  // of a tile where states are more than STEP_FAR or STEP_FAR_AMD

struct Token {
  alignas(64) float a[MAX_HEAD];
  alignas(64) float k[MAX_HEAD];
  alignas(64) float erase[MAX_HEAD];  // a*b*k
  alignas(64) float read[MAX_HEAD];   // scale*a*q
  float read_k;                       // scale*(q.k)
};

// Columns of one state, V its row stride. With each row that is summed comes one into the caches: those from `fetched` on, with
// the last ROWS_AHEAD (of as many or more) those from `follows` on.
struct Tile {
  const Token* token;
  const float* in;
  float* out;
  const float *fetched, *follows;
  int64_t K, V;
};

template <int NV>
struct Vecs {
  Vec x[NV];
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

// The tile `done`, whose u is known, gets its new state from the last number to the first; of `next` come r and p. PARTIAL:
// the last of the NV vectors has only `last` columns.
template <int NV, bool UPDATE, bool REDUCE, bool PARTIAL = false>
GDN2_INLINE void walk(const Tile& done, const Vecs<NV>& u_done, const Tile& next, Vecs<NV>& r_next, Vecs<NV>& p_next,
                      int64_t last = LANES) {
  const auto get = [last](const float* p, int c) {
    return PARTIAL && c == NV - 1 ? load(p + c * LANES, last) : load(p + c * LANES);
  };
  const auto put = [last](float* p, int c, Vec x) {
    if (PARTIAL && c == NV - 1) store(p + c * LANES, x, last);
    else store(p + c * LANES, x);
  };
  const Tile& either = REDUCE ? next : done;
  const int64_t K = either.K, V = either.V;
  Vec r[NV], p[NV], u[NV];
#pragma GCC unroll 16
  for (int c = 0; c < NV; ++c) {
    r[c] = p[c] = set(0.0f);
    if (UPDATE) u[c] = u_done.x[c];
  }
  const float* fetched = next.fetched;
  for (int64_t d = 0; d < K; ++d, fetched += V) {
    const int64_t back = K - 1 - d;
    if (REDUCE && d == K - ROWS_AHEAD) fetched = next.follows;
    Vec a, k, erase, read;
    if (UPDATE) a = set(done.token->a[back]), k = set(done.token->k[back]);
    if (REDUCE) erase = set(next.token->erase[d]), read = set(next.token->read[d]);
#pragma GCC unroll 16
    for (int c = 0; c < NV; ++c) {
      if (REDUCE) {
        if (c * LANES * 4 % CACHE_LINE == 0) __builtin_prefetch(fetched + c * LANES, 1, 3);
        const Vec s = once(get(next.in + d * V, c));
        r[c] = fma(erase, s, r[c]);
        p[c] = fma(read, s, p[c]);
      }
      if (UPDATE) {
        const int e = NV - 1 - c;
        put(done.out + back * V, e, fma(k, u[e], a * get(done.in + back * V, e)));
      }
    }
  }
#pragma GCC unroll 16
  for (int c = 0; REDUCE && c < NV; ++c) {
    r_next.x[c] = r[c];
    p_next.x[c] = p[c];
  }
}

// u of a tile, and its part of o.
template <int NV>
GDN2_INLINE Vecs<NV> solve(float read_k, const float* z, const Vecs<NV>& r, const Vecs<NV>& p, float* o) {
  Vecs<NV> u;
  for (int c = 0; c < NV; ++c) {
    u.x[c] = load(z + c * LANES) - r.x[c];
    store(o + c * LANES, fma(set(read_k), u.x[c], p.x[c]));
  }
  return u;
}

// One value head after the other, columns [v_begin, v_end) of each.
template <class T>
class Cursor {
 public:
  Cursor(const Step& args, int64_t v_begin, int64_t v_end) : args_(args), v_begin_(v_begin), v_end_(v_end) {}

  alignas(64) float z[MAX_HEAD];
  alignas(64) float o[MAX_HEAD];

  // Goes to value head i of N HV: its z, and its token, which serves a group. `following` is the head to come.
  void begin(int64_t i, int64_t following) {
    const Heads& heads = args_.heads;
    const int64_t n = i / heads.HV, hv = i % heads.HV, key = n * heads.H + hv / (heads.HV / heads.H);
    if (key != key_) {
      at_ = 1 - at_;
      load_token<T>(tokens_[at_], args_, n, key - n * heads.H);
      key_ = key;
    }
    const T* v = row<T>(args_.v, n, 0, hv * heads.V);
    const T* w = row<T>(args_.w, n, 0, hv * heads.V);
    for (int64_t c = v_begin_; c < v_end_; c += LANES) {
      store(z + c, load(v + c, v_end_ - c) * load(w + c, v_end_ - c), v_end_ - c);
    }
    at_state_ = state(i);
    at_following_ = state(following);
    out_ = static_cast<T*>(args_.o) + i * heads.V;
  }

  // Columns [c, c + width) of the head.
  Tile tile(int64_t c, int64_t width) const {
    const int64_t K = args_.heads.K, V = args_.heads.V;
    const float* const in = args_.state_in + at_state_ + c;
    float* const out = args_.state_out + at_state_ + c;
    if (in != out) return {&tokens_[at_], in, out, out, out + (K - ROWS_AHEAD) * V, K, V};  // each row of `out`
    const bool last = c + width >= v_end_;
    const float* const follows = last ? args_.state_in + at_following_ + v_begin_ : in + width;
    return {&tokens_[at_], in, out, in + ROWS_AHEAD * V, follows, K, V};
  }

  float read_k() const { return tokens_[at_].read_k; }

  // o of the head is complete.
  void end() {
    for (int64_t c = v_begin_; c < v_end_; c += LANES) store(out_ + c, load(o + c, v_end_ - c), v_end_ - c);
  }

 private:
  // Where the state of value head i begins.
  int64_t state(int64_t i) const {
    const Heads& heads = args_.heads;
    const int64_t n = i / heads.HV, hv = i % heads.HV;
    const int64_t slot = args_.slots == nullptr  ? n
                         : args_.slot_bytes == 4 ? static_cast<const int32_t*>(args_.slots)[n]
                                                 : static_cast<const int64_t*>(args_.slots)[n];
    return (slot * heads.HV + hv) * heads.K * heads.V;
  }

  const Step& args_;
  const int64_t v_begin_, v_end_;
  Token tokens_[2];  // of this head, and of the one whose last tile is not updated yet
  int64_t key_ = -1, at_ = 0, at_state_ = 0, at_following_ = 0;
  T* out_ = nullptr;
};

// The value head that is walked at place j of [begin, end).
GDN2_INLINE int64_t head_at(const Part& part, int64_t j) { return part.down ? part.begin + part.end - 1 - j : j; }

// All tiles have NV whole vectors.
template <class T, int NV>
void step_equal_tiles(const Step& args, const Part& part) {
  const int64_t v_begin = part.v_begin, v_end = part.v_end, width = NV * LANES;
  Cursor<T> head(args, v_begin, v_end);
  Vecs<NV> u, r, p;
  Tile done = {};
  for (int64_t j = part.begin; j < part.end; ++j) {
    head.begin(head_at(part, j), head_at(part, smaller(j + 1, part.end - 1)));
    for (int64_t c = v_begin; c < v_end; c += width) {
      const Tile next = head.tile(c, width);
      if (done.out == nullptr) walk<NV, false, true>(done, u, next, r, p);
      else walk<NV, true, true>(done, u, next, r, p);
      u = solve<NV>(head.read_k(), head.z + c, r, p, head.o + c);
      done = next;
    }
    head.end();
  }
  if (done.out != nullptr) walk<NV, true, false>(done, u, done, r, p);
}

template <int NV, bool PARTIAL>
void step_tile(const Tile& tile, float read_k, const float* z, float* o, int64_t last) {
  Vecs<NV> u, r, p;
  walk<NV, false, true, PARTIAL>(tile, u, tile, r, p, last);
  u = solve<NV>(read_k, z, r, p, o);
  walk<NV, true, false, PARTIAL>(tile, u, tile, r, p, last);
}

template <int NV>
void step_tile_of(int64_t vecs, const Tile& tile, float read_k, const float* z, float* o, int64_t last) {
  if constexpr (NV > 1) {
    if (vecs < NV) return step_tile_of<NV - 1>(vecs, tile, read_k, z, o, last);
  }
  if (last < LANES) step_tile<NV, true>(tile, read_k, z, o, last);
  else step_tile<NV, false>(tile, read_k, z, o, last);
}

// Tiles of different widths, one after the other.
template <class T>
void step_any_tiles(const Step& args, const Part& part) {
  Cursor<T> head(args, part.v_begin, part.v_end);
  for (int64_t j = part.begin; j < part.end; ++j) {
    head.begin(head_at(part, j), head_at(part, smaller(j + 1, part.end - 1)));
    for (int64_t c = part.v_begin; c < part.v_end; c += STEP_VECS * LANES) {
      const int64_t width = smaller(part.v_end - c, STEP_VECS * LANES), vecs = ceil_div(width, LANES);
      const Tile tile = head.tile(c, width);
      step_tile_of<STEP_VECS>(vecs, tile, head.read_k(), head.z + c, head.o + c, width - (vecs - 1) * LANES);
    }
    head.end();
  }
}

template <class T>
void step_part(const Step& args, const Part& part) {
  const int64_t columns = part.v_end - part.v_begin, bytes = (part.end - part.begin) * args.heads.K * columns * 4;
  const bool far = bytes > (is_amd() ? STEP_FAR_AMD : STEP_FAR);
  const auto whole = [columns](int vecs) { return columns % (vecs * LANES) == 0; };
  if (far && whole(FAR_VECS)) return step_equal_tiles<T, FAR_VECS>(args, part);
  if (whole(STEP_VECS)) return step_equal_tiles<T, STEP_VECS>(args, part);
  if (whole(STEP_VECS / 2)) return step_equal_tiles<T, STEP_VECS / 2>(args, part);
  step_any_tiles<T>(args, part);
}

}  // namespace

void step(const Step& args, const Part& part) {
  switch (args.type) {
    case Type::f32: return step_part<float>(args, part);
    case Type::bf16: return step_part<BFloat16>(args, part);
    case Type::f16: return step_part<Float16>(args, part);
  }
}

}  // namespace GDN2_ISA
}  // namespace gdn2
