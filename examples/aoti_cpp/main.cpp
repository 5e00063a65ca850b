// Generates text with an exported GDN-2 model, without Python: reads a prompt, then decodes token by token.
//
//   printf 'import ' | aoti_run OPERATORS.so MODEL.pt2 COUNT        (writes the COUNT most probable next bytes)
//
// The package comes from `gdn2 export MODEL --to aoti -o MODEL.pt2`; the operators are the library libgdn2_torch.so.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

using torch::inductor::AOTIModelPackageLoader;

// The states before the first token: zeros, as the package describes them ("float32 B 384 3;float32 B 4 32 32").
std::vector<at::Tensor> initial_states(const std::string& description, int64_t batch) {
  std::vector<at::Tensor> states;
  std::istringstream all(description);
  for (std::string one; std::getline(all, one, ';');) {
    std::istringstream words(one);
    std::string dtype, axis;
    words >> dtype >> axis;
    std::vector<int64_t> sizes{batch};
    for (int64_t size; words >> size;) sizes.push_back(size);
    const auto type = dtype == "float32"    ? at::kFloat
                      : dtype == "bfloat16" ? at::kBFloat16
                      : dtype == "float16"  ? at::kHalf
                      : dtype == "int64"    ? at::kLong
                                            : throw std::runtime_error("a state of unknown type " + dtype);
    states.push_back(at::zeros(sizes, type));
  }
  return states;
}

int run(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: %s OPERATORS.so MODEL.pt2 COUNT < PROMPT\n", argv[0]);
    return 2;
  }
  // The package names torch.ops.gdn2.*; their schemas and kernels are in this library.
  if (dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 2;
  }
  const std::string prompt{std::istreambuf_iterator<char>(std::cin), {}};
  if (prompt.empty()) {
    std::fprintf(stderr, "expected a prompt of at least one byte, got none\n");
    return 2;
  }
  c10::InferenceMode inference;
  AOTIModelPackageLoader prefill(argv[2], "prefill", /*run_single_threaded=*/true);
  AOTIModelPackageLoader decode(argv[2], "decode", /*run_single_threaded=*/true);

  at::Tensor tokens = at::empty({1, static_cast<int64_t>(prompt.size())}, at::kLong);
  for (size_t i = 0; i < prompt.size(); ++i) tokens[0][i] = static_cast<unsigned char>(prompt[i]);
  std::vector<at::Tensor> inputs = initial_states(prefill.get_metadata().at("states"), 1);
  inputs.insert(inputs.begin(), tokens);
  std::vector<at::Tensor> outputs = prefill.run(inputs);  // logits [1, T, vocab], then the states

  inputs = outputs;  // the states stay where they are: every step overwrites them
  at::Tensor logits = outputs[0].select(1, -1);
  for (int i = 0; i < std::atoi(argv[3]); ++i) {
    inputs[0] = logits.argmax(-1);
    std::putchar(static_cast<int>(inputs[0].item<int64_t>()));
    logits = decode.run(inputs)[0];
  }
  return 0;
}

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", argv[0], error.what());
    return 2;
  }
}
