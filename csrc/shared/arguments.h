// Checks the operators' arguments and converts them for the kernels; the operators' schemas. Uses PyTorch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/version.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "operands.h"

namespace tsae {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

inline Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Double: return kDouble;
    case ScalarType::Float: return kFloat;
    case ScalarType::BFloat16: return kBFloat16;
    case ScalarType::Half: return kHalf;
    default: STD_TORCH_CHECK(false, "features must be float64, float32, bfloat16 or float16"); return kFloat;
  }
}
inline ScalarType compute_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor empty(const Tensor& like, const Sizes& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

// The data of a contiguous tensor of this dtype and shape on the device of `like`; null for nullopt.
inline const void* data_of(const char* name, const std::optional<Tensor>& x, const Tensor& like, ScalarType dtype,
                           const Sizes& sizes) {
  if (!x) return nullptr;
  const bool same_shape = x->dim() == int64_t(sizes.size()) && std::equal(sizes.begin(), sizes.end(), x->sizes().begin());
  STD_TORCH_CHECK(same_device(*x, like) && x->scalar_type() == dtype && same_shape && x->is_contiguous(), name,
                  " has the wrong device, dtype, shape or strides for this operator");
  return x->const_data_ptr();
}

// Features of any strides. Copied into `owner` if the stride along k is neither 1 nor 0.
inline Features features(const char* name, const Tensor& x, const Tensor& like, Tensor& owner) {
  STD_TORCH_CHECK(same_device(x, like) && x.dim() == 3 && x.scalar_type() == like.scalar_type(), name,
                  " must be a [B, T, k] tensor with the features' device and dtype");
  for (int i = 0; i < 3; ++i) STD_TORCH_CHECK(x.size(i) == like.size(i), name, " must have the features' shape");
  STD_TORCH_CHECK(x.size(1) > 0 && x.size(2) > 0, name, " must have at least one position and one feature");
  STD_TORCH_CHECK(x.size(1) < (int64_t(1) << 30), "sequences must have fewer than 2^30 positions");
  const int64_t along_k = x.stride(2);
  owner = along_k == 1 || along_k == 0 || x.size(2) == 1 ? x : torch::stable::contiguous(x);
  return {static_cast<const char*>(owner.const_data_ptr()), owner.stride(0), owner.stride(1),
          owner.size(2) == 1 ? 1 : owner.stride(2)};
}

inline Activation checked_activation(int64_t activation) {
  STD_TORCH_CHECK(activation >= kIdentity && activation <= kGelu, "activation must be 0, 1 or 2");
  return Activation(activation);
}

// [S][2], with offsets clamped to T: no pair is further apart.
inline std::vector<int> limited_bands(const Sizes& bands, int64_t T) {
  STD_TORCH_CHECK(bands.size() % 2 == 0, "bands must hold pairs of offsets");
  std::vector<int> out;
  int64_t reached = 0;
  for (size_t i = 0; i < bands.size(); ++i) {
    STD_TORCH_CHECK(i % 2 ? bands[i] >= reached : bands[i] > reached, "bands must be disjoint and ascending");
    reached = bands[i];
    out.push_back(int(std::min(bands[i], T)));
  }
  return out;
}

// The windows of the backward pass. Adjacent bands share a window, and a window of reach 0 contributes nothing
// (docs/mathematics.md, section 2).
inline std::vector<BackwardWindow> backward_windows(const std::vector<int>& limited) {
  std::vector<BackwardWindow> windows;
  for (int s = 0; s < int(limited.size() / 2); ++s) {
    const int inner = limited[2 * s] - 1, outer = limited[2 * s + 1];
    if (!windows.empty() && windows.back().reach == inner) windows.back().minus = s;
    else if (inner > 0) windows.push_back({inner, -1, s});
    windows.push_back({outer, s, -1});
  }
  return windows;
}

// The schemas of both libraries. `threshold` is [k], or [B, T] for one threshold per position. The last result of
// forward_counted is the transitions of h, [B, 3, k] int32.
template <class Library>
void define_operators(Library& library) {
  library.def(
      "forward(Tensor pre, Tensor? bias, int activation, Tensor? threshold, Tensor? release, int[] bands, "
      "Tensor? segments, bool with_h) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "forward_counted(Tensor pre, Tensor? bias, int activation, Tensor? threshold, Tensor? release, int[] bands, "
      "Tensor? segments, bool with_h) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "backward(Tensor saved, Tensor? bias, Tensor? grad_h, Tensor? grad_differences, Tensor? grad_total, "
      "Tensor? grad_square, int activation, int[] bands, Tensor? segments, Tensor? total=None) -> (Tensor, Tensor)");
  library.def("step_energy(Tensor h, Tensor weights) -> Tensor");
  library.def("step_energy_backward(Tensor h, Tensor weights, Tensor grad) -> Tensor");
  library.def("viterbi_path(Tensor z, Tensor levels, Tensor? segments) -> Tensor");
  library.def("leaky_recurrence(Tensor a, Tensor decay, Tensor? segments) -> Tensor");
  library.def(
      "leaky_recurrence_backward(Tensor grad_h, Tensor decay, Tensor? a, Tensor? h, Tensor? segments) "
      "-> (Tensor, Tensor)");
}

}  // namespace
}  // namespace tsae

// Functions that the loader (tsae_kernels/backends/extension.py) calls before it uses a library.
#define TSAE_EXPORT extern "C" __attribute__((visibility("default")))
#if defined(__clang__)
#define TSAE_COMPILER "clang " __clang_version__
#else
#define TSAE_COMPILER "g++ " __VERSION__
#endif
