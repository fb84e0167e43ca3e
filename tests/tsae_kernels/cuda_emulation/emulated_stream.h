// Replaces csrc/cuda/stream.h: the operators take CPU tensors and need no stream.
#pragma once

#include <torch/csrc/stable/tensor.h>

#define TSAE_LIBRARY tsae_kernels_cuda_emulated  // beside the CUDA library, if that is built too
#define TSAE_DISPATCH_KEY CPU

namespace tsae::cuda {

struct CurrentStream {
  explicit CurrentStream(const torch::stable::Tensor&) {}
  void* get() const { return nullptr; }
};

}  // namespace tsae::cuda
