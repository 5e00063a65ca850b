// What a call of a compiled package costs above the kernel inside: one gdn2::step_inplace, in this process, three ways.
//
//   aoti_overhead OPERATORS.so STEP.pt2 HEADS CHANNELS
//
// Prints nanoseconds per call, one thread: of the kernel on raw pointers, of the operator through torch's dispatcher, and
// of the package, forward(q, k, v, g, b, w, pool, slots) -> o for two tokens and a pool of four states. Each is the best of many short rounds, taken
// in turns; the state stays in cache, so what differs is what stands around the kernel.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <vector>

#include "core.h"

constexpr int64_t N = 2, POOL = 4;
constexpr int ROUNDS = 300, CALLS = 50;

double nanoseconds(const std::function<void()>& call) {
  const auto began = std::chrono::steady_clock::now();
  for (int i = 0; i < CALLS; ++i) call();
  return std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - began).count() / CALLS;
}

int main(int argc, char** argv) {
  if (argc != 5) {
    std::fprintf(stderr, "usage: %s OPERATORS.so STEP.pt2 HEADS CHANNELS\n", argv[0]);
    return 2;
  }
  if (dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 2;
  }
  at::set_num_threads(1);
  c10::InferenceMode inference;
  const int64_t H = std::atoll(argv[3]), K = std::atoll(argv[4]);
  std::vector<at::Tensor> inputs;
  for (int i = 0; i < 6; ++i) inputs.push_back(0.1 * at::rand({N, H, K}));
  inputs[3].neg_();  // the decay
  inputs.push_back(at::zeros({POOL, H, K, K}));
  inputs.push_back(at::tensor({3, 1}, at::kLong));

  at::Tensor o = at::empty({N, H, K});
  const auto view = [&](int i) { return gdn2::View{inputs[i].const_data_ptr(), H * K, 0}; };
  float* state = inputs[6].mutable_data_ptr<float>();
  const void* slots = inputs[7].const_data_ptr();
  const gdn2::Step step{{H, H, K, K}, N,       gdn2::Type::f32, 1.0F,  view(0), view(1), view(2),
                        view(3),      view(4), view(5),         state, state,   slots,   8, o.mutable_data_ptr()};

  using Operator = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                              const at::Tensor&, const at::Tensor&, at::Tensor&, const std::optional<at::Tensor>&, double);
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("gdn2::step_inplace", "").typed<Operator>();
  torch::inductor::AOTIModelPackageLoader package(argv[2], "model", /*run_single_threaded=*/true);

  const std::vector<std::function<void()>> calls{
      [&] { gdn2::step(step, {nullptr, nullptr, 1}); },
      [&] {
        op.call(inputs[0], inputs[1], inputs[2], inputs[3], inputs[4], inputs[5], inputs[6], inputs[7], 1.0);
      },
      [&] { package.run(inputs); },
  };
  std::vector<double> best(calls.size(), std::numeric_limits<double>::infinity());
  for (int round = 0; round < ROUNDS; ++round) {
    for (size_t i = 0; i < calls.size(); ++i) best[i] = std::min(best[i], nanoseconds(calls[i]));
  }
  std::printf("kernel %.0f\noperator %.0f\npackage %.0f\n", best[0], best[1], best[2]);
  return 0;
}
