// PyTorch's current stream on a tensor's device, and a guard that makes that device current.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#define TSAE_LIBRARY tsae_kernels_cuda
#define TSAE_DISPATCH_KEY CUDA

namespace tsae::cuda {

class CurrentStream {
 public:
  explicit CurrentStream(const torch::stable::Tensor& x) : guard_(x.get_device_index()) {
    STD_TORCH_CHECK(x.is_cuda(), "the cuda backend takes tensors on a CUDA device");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_));
  }
  void* get() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

}  // namespace tsae::cuda
