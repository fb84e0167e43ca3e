// The operators of the `cpp` backend, on PyTorch's stable ABI. tsae_kernels/cpp.py calls them; the public operators,
// their shapes for torch.compile and their gradients are in tsae_kernels/ops.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/version.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace tsae {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

// The widest instruction set of this processor, or a narrower one that ATEN_CPU_CAPABILITY asks for, PyTorch's own
// variable for the same purpose.
const Kernels& kernels() {
  static const Kernels* chosen = [] {
#if defined(__x86_64__)
    const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string limit = variable ? variable : "";
    const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool wide = fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (wide && limit != "default" && limit != "avx2") return &avx512::kernels;
    if (fma && limit != "default") return &avx2::kernels;
#endif
    return &baseline::kernels;
  }();
  return *chosen;
}

Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Double: return kDouble;
    case ScalarType::Float: return kFloat;
    case ScalarType::BFloat16: return kBFloat16;
    case ScalarType::Half: return kHalf;
    default: STD_TORCH_CHECK(false, "features must be float64, float32, bfloat16 or float16"); return kFloat;
  }
}
ScalarType compute_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor empty(const Tensor& like, const Sizes& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

// The data of a contiguous tensor of the given dtype and shape, null if there is none.
const void* data_of(const char* name, const std::optional<Tensor>& x, ScalarType dtype, const Sizes& sizes) {
  if (!x) return nullptr;
  const bool same_shape = x->dim() == int64_t(sizes.size()) && std::equal(sizes.begin(), sizes.end(), x->sizes().begin());
  STD_TORCH_CHECK(x->is_cpu() && x->scalar_type() == dtype && same_shape && x->is_contiguous(), name,
                  " has the wrong device, dtype, shape or strides for this operator");
  return x->const_data_ptr();
}

// Features of any strides; copied into `owner` if neighbours along k lie apart (but not if they are all the same).
Features features(const char* name, const Tensor& x, const Tensor& like, Tensor& owner) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 3 && x.scalar_type() == like.scalar_type(), name,
                  " must be a [B, T, k] tensor on the CPU with the features' dtype");
  for (int i = 0; i < 3; ++i) STD_TORCH_CHECK(x.size(i) == like.size(i), name, " must have the features' shape");
  STD_TORCH_CHECK(x.size(1) > 0 && x.size(2) > 0, name, " must have at least one position and one feature");
  const int64_t along_k = x.stride(2);
  owner = along_k == 1 || along_k == 0 || x.size(2) == 1 ? x : torch::stable::contiguous(x);
  return {static_cast<const char*>(owner.const_data_ptr()), owner.stride(0), owner.stride(1),
          owner.size(2) == 1 ? 1 : owner.stride(2)};
}

// Worth writing past the caches: larger than they are, and every tile's row starts on a cache line.
bool to_be_streamed(const Tensor& result) {
  constexpr int64_t cache = int64_t(4) << 20;
  const int64_t bytes = result.numel() * result.element_size(), row = result.size(2) * result.element_size();
  return bytes > cache && row % 64 == 0 && reinterpret_cast<uintptr_t>(result.const_data_ptr()) % 64 == 0;
}

// Runs f(b, tile, scratch, runs of b) for all tiles of all sequences, on PyTorch's threads. What a tile computes does
// not depend on the thread it runs on.
template <class F>
void for_each_tile(const Tensor& x, const std::optional<Tensor>& segments, int64_t rows, const F& f) {
  const int64_t B = x.size(0), T = x.size(1), k = x.size(2);
  const int64_t width = kernels().width(dtype_of(x)), tiles = (k + width - 1) / width;
  STD_TORCH_CHECK(T < (int64_t(1) << 30), "sequences must have fewer than 2^30 positions");
  const auto* ids = static_cast<const int64_t*>(data_of("segments", segments, ScalarType::Long, {B, T}));
  const int64_t worthwhile = std::max<int64_t>(1, 16384 / (T * width));  // tiles that a thread is woken for
  torch::stable::parallel_for(0, B * tiles, worthwhile, [&](int64_t begin, int64_t end) {
    constexpr size_t alignment = 64;
    std::unique_ptr<char[]> memory(new char[rows * kernels().row_bytes + alignment]);
    void* scratch = memory.get();
    size_t space = rows * kernels().row_bytes + alignment;
    std::align(alignment, rows * kernels().row_bytes, scratch, space);
    std::vector<Run> runs;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / tiles;
      if (i == begin || i % tiles == 0) {
        runs.clear();
        const int64_t* row = ids ? ids + b * T : nullptr;
        for (int64_t t = 0; t < T; ++t) {
          if (!runs.empty() && (!row || row[t] == row[t - 1])) runs.back().end = int(t + 1);
          else runs.push_back({int(t), int(t + 1), row && row[t] < 0});
        }
      }
      f(b, i % tiles, scratch, Runs{runs.data(), int64_t(runs.size())});
    }
  });
}

// [S][2], limited to T: an offset of T or more finds no pair.
std::vector<int> limited_bands(const Sizes& bands, int64_t T) {
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

// `level` is [k], or [B, T] for a threshold per position. `with_h` false: an empty tensor in h's place.
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor pre, std::optional<Tensor> bias, int64_t activation,
                                                   std::optional<Tensor> level, std::optional<Tensor> release,
                                                   Sizes bands, std::optional<Tensor> segments, bool with_h) {
  Tensor owner;
  Forward f{};
  f.pre = features("pre", pre, pre, owner);
  const int64_t B = pre.size(0), S = bands.size() / 2;
  f.T = pre.size(1), f.k = pre.size(2), f.S = S;
  const ScalarType dtype = compute_type(pre);
  STD_TORCH_CHECK(activation >= kIdentity && activation <= kGelu, "activation must be 0, 1 or 2");
  f.activation = Activation(activation);
  f.bias = data_of("bias", bias, dtype, {f.k});
  f.level_per_position = level && level->dim() == 2;
  f.level = data_of("level", level, dtype, f.level_per_position ? Sizes{B, f.T} : Sizes{f.k});
  f.release = data_of("release", release, dtype, {f.k});
  const std::vector<int> limited = limited_bands(bands, f.T);
  f.bands = limited.data();
  Tensor h = empty(pre, with_h ? Sizes{B, f.T, f.k} : Sizes{0}, pre.scalar_type());
  Tensor differences = empty(pre, {B, S, f.k}, dtype), total = empty(pre, {B, f.k}, dtype),
         square = empty(pre, {B, f.k}, dtype);
  f.h = with_h ? h.mutable_data_ptr() : nullptr;
  f.stream = with_h && to_be_streamed(h);
  f.differences = differences.mutable_data_ptr();
  f.total = total.mutable_data_ptr();
  f.square = square.mutable_data_ptr();
  const Dtype stored = dtype_of(pre);
  for_each_tile(pre, segments, forward_rows(f.T), [&](int64_t b, int64_t tile, void* scratch, Runs runs) {
    kernels().forward(stored, f, runs, b, tile, scratch);
  });
  return {h, differences, total, square};
}

// `grad_differences` is [1 or B, S, k]. The second result is [B, k]: grad_bias before the sum over the batch, which the
// caller takes in a fixed order.
std::tuple<Tensor, Tensor> backward(Tensor saved, std::optional<Tensor> bias, std::optional<Tensor> grad_h,
                                    std::optional<Tensor> grad_differences, std::optional<Tensor> grad_total,
                                    std::optional<Tensor> grad_square, int64_t activation, Sizes bands,
                                    std::optional<Tensor> segments) {
  Tensor owner, grad_owner;
  Backward f{};
  f.saved = features("saved", saved, saved, owner);
  if (grad_h) f.grad_h = features("grad_h", *grad_h, saved, grad_owner);
  const int64_t B = saved.size(0), S = bands.size() / 2;
  f.T = saved.size(1), f.k = saved.size(2), f.S = S;
  const ScalarType dtype = compute_type(saved);
  STD_TORCH_CHECK(activation >= kIdentity && activation <= kGelu, "activation must be 0, 1 or 2");
  f.activation = Activation(activation);
  f.bias = data_of("bias", bias, dtype, {f.k});
  const bool shared = grad_differences && B != 1 && grad_differences->size(0) == 1;
  f.grad_differences = data_of("grad_differences", grad_differences, dtype, {shared ? 1 : B, S, f.k});
  f.differences_batch = shared ? 0 : S * f.k;
  f.grad_total = data_of("grad_total", grad_total, dtype, {B, f.k});
  f.grad_square = data_of("grad_square", grad_square, dtype, {B, f.k});

  // Neighbouring bands share a window, and the window of reach 0 pulls nowhere (mathematics, section 2).
  const std::vector<int> limited = limited_bands(bands, f.T);
  std::vector<Share> shares;
  for (int s = 0; s < S; ++s) {
    const int inner = limited[2 * s] - 1, outer = limited[2 * s + 1];
    if (!shares.empty() && shares.back().reach == inner) shares.back().minus = s;
    else if (inner > 0) shares.push_back({inner, -1, s});
    shares.push_back({outer, s, -1});
  }
  f.shares = shares.data();
  f.number_of_shares = shares.size();

  Tensor grad_pre = empty(saved, {B, f.T, f.k}, saved.scalar_type()), grad_bias = empty(saved, {B, f.k}, dtype);
  f.grad_pre = grad_pre.mutable_data_ptr();
  f.stream = to_be_streamed(grad_pre);
  f.grad_bias = grad_bias.mutable_data_ptr();
  const Dtype stored = dtype_of(saved);
  const int64_t rows = backward_rows(f.T, f.number_of_shares);
  for_each_tile(saved, segments, rows, [&](int64_t b, int64_t tile, void* scratch, Runs runs) {
    kernels().backward(stored, f, runs, b, tile, scratch);
  });
  return {grad_pre, grad_bias};
}

// The energy of every tile, [B, tiles] float64, which the caller sums in a fixed order.
Tensor step_energy(Tensor h, Tensor weights) {
  Tensor owner;
  Steps f{};
  f.h = features("h", h, h, owner);
  const int64_t B = h.size(0);
  f.T = h.size(1), f.k = h.size(2);
  f.weights = data_of("weights", weights, compute_type(h), {B, f.T});
  const Dtype stored = dtype_of(h);
  const int64_t width = kernels().width(stored);
  Tensor energy = empty(h, {B, (f.k + width - 1) / width}, ScalarType::Double);
  f.energy = static_cast<double*>(energy.mutable_data_ptr());
  for_each_tile(h, std::nullopt, 0, [&](int64_t b, int64_t tile, void*, Runs) {
    kernels().step_energy(stored, f, b, tile);
  });
  return energy;
}

Tensor step_energy_backward(Tensor h, Tensor weights, Tensor grad) {
  Tensor owner;
  Steps f{};
  f.h = features("h", h, h, owner);
  const int64_t B = h.size(0);
  f.T = h.size(1), f.k = h.size(2);
  f.weights = data_of("weights", weights, compute_type(h), {B, f.T});
  f.scale = *static_cast<const double*>(data_of("grad", grad, ScalarType::Double, {}));
  Tensor grad_h = empty(h, {B, f.T, f.k}, h.scalar_type());
  f.grad_h = grad_h.mutable_data_ptr();
  f.stream = to_be_streamed(grad_h);
  const Dtype stored = dtype_of(h);
  for_each_tile(h, std::nullopt, 0, [&](int64_t b, int64_t tile, void*, Runs) {
    kernels().step_energy_backward(stored, f, b, tile);
  });
  return grad_h;
}

}  // namespace
}  // namespace tsae

// What the loader (tsae_kernels/extension.py) asks before it uses the library.
#define TSAE_EXPORT extern "C" __attribute__((visibility("default")))
#if defined(__clang__)
#define TSAE_COMPILER "clang " __clang_version__
#else
#define TSAE_COMPILER "g++ " __VERSION__
#endif
// To be raised with every change of an operator's signature: a library left over from older sources is then not used.
TSAE_EXPORT int tsae_interface() { return 1; }
TSAE_EXPORT const char* tsae_built_for() { return "torch " TORCH_VERSION ", " TSAE_COMPILER; }
TSAE_EXPORT const char* tsae_instruction_sets() {
#if defined(__x86_64__)
  return "baseline, avx2, avx512";
#else
  return "baseline";
#endif
}
TSAE_EXPORT const char* tsae_instruction_set() { return tsae::kernels().name; }

STABLE_TORCH_LIBRARY(tsae_kernels_cpp, library) {
  library.def(
      "forward(Tensor pre, Tensor? bias, int activation, Tensor? level, Tensor? release, int[] bands, "
      "Tensor? segments, bool with_h) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "backward(Tensor saved, Tensor? bias, Tensor? grad_h, Tensor? grad_differences, Tensor? grad_total, "
      "Tensor? grad_square, int activation, int[] bands, Tensor? segments) -> (Tensor, Tensor)");
  library.def("step_energy(Tensor h, Tensor weights) -> Tensor");
  library.def("step_energy_backward(Tensor h, Tensor weights, Tensor grad) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tsae_kernels_cpp, CPU, library) {
  library.impl("forward", TORCH_BOX(&tsae::forward));
  library.impl("backward", TORCH_BOX(&tsae::backward));
  library.impl("step_energy", TORCH_BOX(&tsae::step_energy));
  library.impl("step_energy_backward", TORCH_BOX(&tsae::step_energy_backward));
}
