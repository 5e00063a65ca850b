// The C++ core called by a C++ program: what the kernels take when no framework stands before them.
//
//   step(call)      one token for each state, in place        chunk(call)    whole sequences from a state, the final one in place
//   backward(call)  the gradients of chunk from that of o, into the same memory every time
//
// The threads are OpenMP's, each with the same run of consecutive tasks on every call.
#include "core.h"

#include <cstdlib>

#include <omp.h>

using namespace gdn2;

struct Call {
  int64_t N, T, H, K, V, threads;
  const float *q, *k, *v, *g, *b, *w;
  float *state, *o;
  const float* d_o;
  float *dq, *dk, *dv, *dg, *db, *dw, *dstate;
};

namespace {

void run(void* context, int64_t tasks, void (*body)(void*, int64_t), void* closure) {
  const int threads = static_cast<int>(static_cast<const Call*>(context)->threads);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < tasks; ++i) body(closure, i);
}

ThreadPool pool(const Call& x) { return {run, const_cast<Call*>(&x), static_cast<int>(x.threads)}; }

float scale(const Call& x) { return 1.0f / __builtin_sqrtf(static_cast<float>(x.K)); }

}  // namespace

extern "C" void step(const Call* x) {
  const auto view = [](const float* data, int64_t row) { return View{data, row, 0}; };
  const int64_t keys = x->H * x->K, values = x->H * x->V;
  gdn2::step({{x->H, x->H, x->K, x->V}, x->N, Type::f32, scale(*x), view(x->q, keys), view(x->k, keys), view(x->v, values),
              view(x->g, keys), view(x->b, keys), view(x->w, values), x->state, x->state, nullptr, 8, x->o},
             pool(*x));
}

static Sequences sequences(const Call* x) {
  const auto view = [x](const float* data, int64_t row) { return View{data, x->T * row, row}; };
  const int64_t keys = x->H * x->K, values = x->H * x->V;
  return {{x->H, x->H, x->K, x->V}, x->N, x->T, nullptr, Type::f32, scale(*x), view(x->q, keys), view(x->k, keys),
          view(x->v, values), view(x->g, keys), view(x->b, keys), view(x->w, values), x->state};
}

static void must(bool done) {
  if (!done) std::abort();  // out of memory
}

extern "C" void chunk(const Call* x) { must(gdn2::chunk({sequences(x), x->o, x->state}, pool(*x))); }

extern "C" void backward(const Call* x) {
  const int64_t values = x->H * x->V;
  const ChunkBackward args = {sequences(x), {x->d_o, x->T * values, values}, nullptr, x->dq, x->dk, x->dv, x->dg, x->db,
                              x->dw, x->dstate};
  must(gdn2::chunk_backward(args, pool(*x)));
}
