// Runs an exported GDN-2 program without Python: loads the operators, then the AOTInductor package, then decodes tokens.
//
//   aoti_run OPERATORS.so MODEL.pt2 COUNT STATE_SHAPE ...     (writes the COUNT most probable bytes after an "i")
//
// The package is of a module forward(input_ids [1, 1], *past) -> (logits [1, 1, vocab], *present).
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

int main(int argc, char** argv) {
  if (argc < 5) {
    std::fprintf(stderr, "usage: %s OPERATORS.so MODEL.pt2 COUNT STATE_SHAPE ...   (a shape is 1x384x3)\n", argv[0]);
    return 2;
  }
  // The package names torch.ops.gdn2.*; their schemas and kernels are in this library.
  if (dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 2;
  }
  c10::InferenceMode inference;
  torch::inductor::AOTIModelPackageLoader model(argv[2]);
  std::vector<at::Tensor> inputs{torch::full({1, 1}, 'i', torch::kInt64)};
  for (int i = 4; i < argc; ++i) {
    std::vector<int64_t> shape;
    for (char* at = argv[i]; *at != '\0'; at += *at == 'x') shape.push_back(std::strtoll(at, &at, 10));
    inputs.push_back(torch::zeros(shape));
  }
  for (int i = 0; i < std::atoi(argv[3]); ++i) {
    std::vector<at::Tensor> outputs = model.run(inputs);
    outputs[0] = outputs[0].argmax(-1);
    std::putchar(static_cast<int>(outputs[0].item<int64_t>()));
    inputs = std::move(outputs);
  }
  return 0;
}
