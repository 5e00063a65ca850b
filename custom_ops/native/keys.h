// One chunk of CHUNK tokens as one key head sees it, and the gradients that meet in q k g b. Letters as in backward.cpp.
//
// gamma_i = a_1 .. a_i and kd_ij = a_{j+1} .. a_i k_j are running products: no exponent of a difference, no quotient, exact
// at any decay. Their derivative runs the products backwards, so dg is a sum of local terms and not a difference of sums.
#pragma once

#include "products.h"

namespace gdn2 {
namespace GDN2_ISA {

constexpr int ROW = MAX_HEAD + 16;  // off a power of two: rows of a matrix fall in different cache sets

struct Keys {
  float a_CK[CHUNK][ROW], q_CK[CHUNK][ROW], k_CK[CHUNK][ROW], b_CK[CHUNK][ROW];
  float read_erase[2 * CHUNK][ROW];  // rows gamma*q, then rows -gamma*b*k
  float write_CK[CHUNK][ROW];        // kd_Cj
  float decay_K[ROW];                // gamma_C
};

struct Scores {
  float t_CC[CHUNK * CHUNK];     // (b_i k_i).kd_ij, j < i
  float read_CC[CHUNK * CHUNK];  // q_i.kd_ij, j <= i
};

// The share of one lane. Products that sum over V leave tokens in the vector: [K, tokens].
struct Partial {
  explicit Partial(float* data, int64_t K)
      : d_read_erase(data), d_write(data + 2 * CHUNK * K), d_decay(data + 3 * CHUNK * K), d_scores(d_decay + K) {}
  float* d_read_erase;  // [K, 2 CHUNK]
  float* d_write;       // [K, CHUNK]
  float* d_decay;       // [K]
  float* d_scores;      // [2 CHUNK, CHUNK]: rows d read, then rows -d t; above the diagonal unused
};

// Tokens past `count` are inert: a = 1, the rest 0.
template <class T>
void load_keys(Keys& keys, const Sequences& in, int64_t batch, int64_t token, int64_t h, int64_t count) {
  const int64_t K = in.heads.K, K_padded = ceil_div(K, COLUMNS) * COLUMNS;
  for (int64_t d = 0; d < K_padded; d += LANES) {
    const int64_t left = K - d, at = h * K + d;
    Vec gamma = set(1.0f), tail = set(1.0f);
    for (int64_t i = 0; i < CHUNK; ++i) {
      Vec a = set(1.0f), q = set(0.0f), k = q, b = q;
      if (i < count && left > 0) {
        a = exp(load(row<float>(in.g, batch, token + i, at), left));
        q = load(row<T>(in.q, batch, token + i, at), left);
        k = load(row<T>(in.k, batch, token + i, at), left);
        b = load(row<T>(in.b, batch, token + i, at), left);
      }
      gamma = gamma * a;
      store(keys.a_CK[i] + d, a);
      store(keys.q_CK[i] + d, q);
      store(keys.k_CK[i] + d, k);
      store(keys.b_CK[i] + d, b);
      store(keys.read_erase[i] + d, gamma * q);
      store(keys.read_erase[CHUNK + i] + d, set(0.0f) - gamma * (b * k));
    }
    store(keys.decay_K + d, gamma);
    for (int64_t i = CHUNK - 1; i >= 0; --i) {
      store(keys.write_CK[i] + d, tail * load(keys.k_CK[i] + d));
      tail = tail * load(keys.a_CK[i] + d);
    }
  }
}

// Four columns at once; those at and past i hold zeros or what no one reads.
inline void score_keys(Scores& scores, const Keys& keys, int64_t K_padded) {
  constexpr int NJ = 4;
  alignas(64) float kd[CHUNK][ROW];
  for (int64_t j = 0; j < CHUNK; ++j) std::memset(kd[j], 0, static_cast<size_t>(K_padded) * sizeof(float));
  for (int64_t i = 0; i < CHUNK; ++i) {
    for (int64_t j0 = 0; j0 < i; j0 += NJ) {
      Vec t[NJ], read[NJ];
      for (int j = 0; j < NJ; ++j) t[j] = read[j] = set(0.0f);
      for (int64_t d = 0; d < K_padded; d += LANES) {
        const Vec a = load(keys.a_CK[i] + d), q = load(keys.q_CK[i] + d);
        const Vec e = load(keys.b_CK[i] + d) * load(keys.k_CK[i] + d);
        for (int j = 0; j < NJ; ++j) {
          const Vec kd_j = load(kd[j0 + j] + d) * a;
          store(kd[j0 + j] + d, kd_j);
          t[j] = fma(e, kd_j, t[j]);
          read[j] = fma(q, kd_j, read[j]);
        }
      }
      for (int j = 0; j < NJ; ++j) {
        scores.t_CC[i * CHUNK + j0 + j] = sum(t[j]);
        scores.read_CC[i * CHUNK + j0 + j] = sum(read[j]);
      }
    }
    Vec read = set(0.0f);
    for (int64_t d = 0; d < K_padded; d += LANES) {
      const Vec k = load(keys.k_CK[i] + d);
      store(kd[i] + d, k);
      read = fma(load(keys.q_CK[i] + d), k, read);
    }
    scores.read_CC[i * CHUNK + i] = sum(read);
  }
}

// Lanes in order, so the sum is the same whoever computed them.
inline void add_partials(float* total, const float* partials, int64_t lanes, int64_t floats) {
  for (int64_t c = 0; c < floats; c += LANES) {
    Vec sums = load(partials + c);
    for (int64_t lane = 1; lane < lanes; ++lane) sums = sums + load(partials + lane * floats + c);
    store(total + c, sums);
  }
}

struct KeyGradients {
  float read_erase[2 * CHUNK][ROW];  // with respect to Keys::read_erase and write_CK
  float write_CK[CHUNK][ROW];
  const float *decay_K, *scores;
};

// Channels [d, d + LANES) of all tokens. h_j is the gradient of kd_ij, kept while i runs down; h_0 that of gamma_i.
template <class T>
void backward_channels(const ChunkBackward& args, const Keys& keys, const KeyGradients& grad, int64_t d, int64_t at_out,
                       int64_t stride, int64_t count, int64_t left) {
  Vec kd[CHUNK][CHUNK], gamma[CHUNK], h[CHUNK];
  for (int64_t i = 0; i < CHUNK; ++i) {
    const Vec a = load(keys.a_CK[i] + d);
    gamma[i] = i == 0 ? a : gamma[i - 1] * a;
    for (int64_t j = 0; j < i; ++j) kd[i][j] = kd[i - 1][j] * a;
    kd[i][i] = load(keys.k_CK[i] + d);
    h[i] = load(grad.write_CK[i] + d);
  }
  Vec a_next = set(1.0f), h_0 = load(grad.decay_K + d);
  for (int64_t i = CHUNK - 1; i >= 0; --i) {
    const Vec q = load(keys.q_CK[i] + d), b = load(keys.b_CK[i] + d), e = b * kd[i][i];
    const Vec d_read = load(grad.read_erase[i] + d), d_erase = load(grad.read_erase[CHUNK + i] + d);
    const float *read = grad.scores + i * CHUNK, *erase = read + CHUNK * CHUNK;
    h_0 = fma(a_next, h_0, fnma(d_erase, e, d_read * q));
    Vec dq = gamma[i] * d_read, minus_de = gamma[i] * d_erase, dg = h_0 * gamma[i];
    for (int64_t j = 0; j < i; ++j) {
      const Vec read_j = set(read[j]), erase_j = set(erase[j]);
      h[j] = fma(a_next, h[j], fnma(erase_j, e, read_j * q));
      dg = fma(h[j], kd[i][j], dg);
      dq = fma(read_j, kd[i][j], dq);
      minus_de = fma(erase_j, kd[i][j], minus_de);
    }
    const Vec read_i = set(read[i]);
    const Vec dk = fnma(minus_de, b, fma(a_next, h[i], read_i * q));
    dq = fma(read_i, kd[i][i], dq);
    if (i < count) {
      const int64_t at = at_out + i * stride + d;
      store(static_cast<T*>(args.dq) + at, dq, left);
      store(static_cast<T*>(args.dk) + at, dk, left);
      store(static_cast<T*>(args.db) + at, set(0.0f) - minus_de * kd[i][i], left);
      store(args.dg + at, dg, left);
    }
    a_next = load(keys.a_CK[i] + d);
  }
}

// Size of the memory that backward_chunk_keys works in.
inline int64_t key_sums_floats(const Heads& heads) {
  return partial_floats(heads) + static_cast<int64_t>(sizeof(KeyGradients) / sizeof(float));
}

// dq dk dg db of one chunk from the sum of its lanes' partials.
template <class T>
void backward_chunk_keys(const ChunkBackward& args, const Keys& keys, int64_t at_out, int64_t count, const float* partials,
                         float* memory) {
  const Heads& heads = args.in.heads;
  const int64_t K_padded = ceil_div(heads.K, COLUMNS) * COLUMNS, floats = partial_floats(heads);
  add_partials(memory, partials, lanes_of(heads), floats);
  const Partial sums(memory, K_padded);
  KeyGradients& grad = *reinterpret_cast<KeyGradients*>(memory + floats);
  transpose(K_padded, 2 * CHUNK, sums.d_read_erase, 2 * CHUNK, grad.read_erase[0], ROW);
  transpose(K_padded, CHUNK, sums.d_write, CHUNK, grad.write_CK[0], ROW);
  grad.decay_K = sums.d_decay;
  grad.scores = sums.d_scores;
  for (int64_t d = 0; d < heads.K; d += LANES) {
    backward_channels<T>(args, keys, grad, d, at_out, heads.H * heads.K, count, heads.K - d);
  }
}

}  // namespace GDN2_ISA
}  // namespace gdn2
