// The operators of the `cpp` backend, on PyTorch's stable ABI. tsae_kernels/backends/compiled.py calls them; the public
// operators, with autograd and fake implementations, are in tsae_kernels/ops.py.
#include <cstdlib>
#include <memory>
#include <string>
#include <tuple>

#include "../shared/arguments.h"
#include "kernels.h"

namespace tsae {

// The kernels for the widest instruction set of this processor, or for a narrower one selected with
// ATEN_CPU_CAPABILITY, which PyTorch reads for the same purpose.
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

namespace {

// Whether to write `result` with streaming stores: it exceeds the caches, and every tile's row starts on a cache line.
bool use_streaming_stores(const Tensor& result) {
  constexpr int64_t cache = int64_t(4) << 20;
  const int64_t bytes = result.numel() * result.element_size(), row = result.size(2) * result.element_size();
  return bytes > cache && row % 64 == 0 && reinterpret_cast<uintptr_t>(result.const_data_ptr()) % 64 == 0;
}

// Rows of the ring buffer: a block and the `rows` that its windows need besides, or all T.
int64_t ring_of(int64_t rows, int64_t T) { return std::min(rows + kBlock, T); }

// Runs f(b, tile, count, scratch, runs of b) for all tiles of all sequences, on PyTorch's threads. With `grouped`, long
// sequences are processed several adjacent tiles at a time. `rows`: scratch rows per tile. The result for a tile
// depends neither on its thread nor on the tiles it is grouped with.
template <class F>
void for_each_tile(const Tensor& x, const std::optional<Tensor>& segments, bool grouped, int64_t rows, const F& f) {
  const int64_t B = x.size(0), T = x.size(1), k = x.size(2);
  const int64_t width = kernels().width(dtype_of(x)), tiles = (k + width - 1) / width;
  const auto* ids = static_cast<const int64_t*>(data_of("segments", segments, x, ScalarType::Long, {B, T}));
  const int64_t together = grouped && T > kRowsKept ? kTilesTogether : 1;
  rows *= together;
  const int64_t worthwhile = std::max<int64_t>(1, 16384 / (T * width));  // fewest tiles worth waking a thread for
  torch::stable::parallel_for(0, B * tiles, worthwhile, [&](int64_t begin, int64_t end) {
    constexpr size_t alignment = 64;
    std::unique_ptr<char[]> memory(new char[rows * kernels().row_bytes + alignment]);
    void* scratch = memory.get();
    size_t space = rows * kernels().row_bytes + alignment;
    std::align(alignment, rows * kernels().row_bytes, scratch, space);
    std::vector<Run> runs;
    for (int64_t i = begin, count; i < end; i += count) {
      const int64_t b = i / tiles;
      count = std::min({together, end - i, (b + 1) * tiles - i});
      if (i == begin || i % tiles == 0) {
        runs.clear();
        const int64_t* row = ids ? ids + b * T : nullptr;
        for (int64_t t = 0; t < T; ++t) {
          if (!runs.empty() && (!row || row[t] == row[t - 1])) runs.back().end = int(t + 1);
          else runs.push_back({int(t), int(t + 1), row && row[t] < 0});
        }
      }
      f(b, i % tiles, count, scratch, Runs{runs.data(), int64_t(runs.size())});
    }
  });
}

using Counted = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Counted run_forward(Tensor pre, std::optional<Tensor> bias, int64_t activation, std::optional<Tensor> threshold,
                    std::optional<Tensor> release, Sizes bands, std::optional<Tensor> segments, bool with_h,
                    bool counted) {
  Tensor owner;
  Forward f{};
  f.pre = features("pre", pre, pre, owner);
  const int64_t B = pre.size(0), S = bands.size() / 2;
  f.T = pre.size(1), f.k = pre.size(2), f.S = S;
  const ScalarType dtype = compute_type(pre);
  f.activation = checked_activation(activation);
  f.bias = data_of("bias", bias, pre, dtype, {f.k});
  f.threshold_per_position = threshold && threshold->dim() == 2;
  f.threshold = data_of("threshold", threshold, pre, dtype, f.threshold_per_position ? Sizes{B, f.T} : Sizes{f.k});
  f.release = data_of("release", release, pre, dtype, {f.k});
  const std::vector<int> limited = limited_bands(bands, f.T);
  f.bands = limited.data();
  f.ring = ring_of(S > 0 ? limited.back() + 1 : 0, f.T);  // the widest window and the row leaving it
  Tensor h = empty(pre, with_h ? Sizes{B, f.T, f.k} : Sizes{0}, pre.scalar_type());
  Tensor differences = empty(pre, {B, S, f.k}, dtype), total = empty(pre, {B, f.k}, dtype),
         square = empty(pre, {B, f.k}, dtype);
  Tensor transitions = counted ? empty(pre, {B, 3, f.k}, ScalarType::Int) : square;
  f.h = with_h ? h.mutable_data_ptr() : nullptr;
  f.stream = with_h && use_streaming_stores(h);
  f.differences = differences.mutable_data_ptr();
  f.total = total.mutable_data_ptr();
  f.square = square.mutable_data_ptr();
  f.transitions = counted ? transitions.mutable_data_ptr() : nullptr;
  const Dtype stored = dtype_of(pre);
  const int64_t rows = f.ring + 2 * S;
  for_each_tile(pre, segments, true, rows, [&](int64_t b, int64_t tile, int64_t tiles, void* scratch, Runs runs) {
    kernels().forward(stored, f, runs, b, tile, tiles, scratch);
  });
  return {h, differences, total, square, transitions};
}

// If `with_h` is false, h is an empty tensor.
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor pre, std::optional<Tensor> bias, int64_t activation,
                                                   std::optional<Tensor> threshold, std::optional<Tensor> release,
                                                   Sizes bands, std::optional<Tensor> segments, bool with_h) {
  const auto [h, differences, total, square, none] =
      run_forward(pre, bias, activation, threshold, release, bands, segments, with_h, false);
  return {h, differences, total, square};
}

Counted forward_counted(Tensor pre, std::optional<Tensor> bias, int64_t activation, std::optional<Tensor> threshold,
                        std::optional<Tensor> release, Sizes bands, std::optional<Tensor> segments, bool with_h) {
  return run_forward(pre, bias, activation, threshold, release, bands, segments, with_h, true);
}

// `grad_differences` is [1 or B, S, k]. The second result is grad_bias before the sum over the batch, [B, k]; the
// caller sums it in a fixed order. The last argument, the sum of h over T, is for the CUDA library.
std::tuple<Tensor, Tensor> backward(Tensor saved, std::optional<Tensor> bias, std::optional<Tensor> grad_h,
                                    std::optional<Tensor> grad_differences, std::optional<Tensor> grad_total,
                                    std::optional<Tensor> grad_square, int64_t activation, Sizes bands,
                                    std::optional<Tensor> segments, std::optional<Tensor>) {
  Tensor owner, grad_owner;
  Backward f{};
  f.saved = features("saved", saved, saved, owner);
  if (grad_h) f.grad_h = features("grad_h", *grad_h, saved, grad_owner);
  const int64_t B = saved.size(0), S = bands.size() / 2;
  f.T = saved.size(1), f.k = saved.size(2), f.S = S;
  const ScalarType dtype = compute_type(saved);
  f.activation = checked_activation(activation);
  f.bias = data_of("bias", bias, saved, dtype, {f.k});
  const bool shared = grad_differences && B != 1 && grad_differences->size(0) == 1;
  f.grad_differences = data_of("grad_differences", grad_differences, saved, dtype, {shared ? 1 : B, S, f.k});
  f.differences_batch = shared ? 0 : S * f.k;
  f.grad_total = data_of("grad_total", grad_total, saved, dtype, {B, f.k});
  f.grad_square = data_of("grad_square", grad_square, saved, dtype, {B, f.k});

  const std::vector<BackwardWindow> windows = backward_windows(limited_bands(bands, f.T));
  f.windows = windows.data();
  f.number_of_windows = windows.size();
  for (const BackwardWindow& window : windows) f.reach = std::max(f.reach, window.reach);
  f.ring = ring_of(2 * int64_t(f.reach) + 1, f.T);  // the widest window and the row leaving it

  Tensor grad_pre = empty(saved, {B, f.T, f.k}, saved.scalar_type()), grad_bias = empty(saved, {B, f.k}, dtype);
  f.grad_pre = grad_pre.mutable_data_ptr();
  f.stream = use_streaming_stores(grad_pre);
  f.grad_bias = grad_bias.mutable_data_ptr();
  const Dtype stored = dtype_of(saved);
  const int64_t rows = f.ring + 3 * f.number_of_windows;
  for_each_tile(saved, segments, true, rows, [&](int64_t b, int64_t tile, int64_t tiles, void* scratch, Runs runs) {
    kernels().backward(stored, f, runs, b, tile, tiles, scratch);
  });
  return {grad_pre, grad_bias};
}

Steps steps_of(const Tensor& h, const Tensor& weights, Tensor& owner) {
  Steps f{};
  f.h = features("h", h, h, owner);
  f.T = h.size(1), f.k = h.size(2);
  f.weights = data_of("weights", weights, h, compute_type(h), {h.size(0), f.T});
  return f;
}

// The energy of every tile, [B, tiles] float64; the caller sums it in a fixed order.
Tensor step_energy(Tensor h, Tensor weights) {
  Tensor owner;
  Steps f = steps_of(h, weights, owner);
  const Dtype stored = dtype_of(h);
  const int64_t width = kernels().width(stored);
  Tensor energy = empty(h, {h.size(0), (f.k + width - 1) / width}, ScalarType::Double);
  f.energy = static_cast<double*>(energy.mutable_data_ptr());
  for_each_tile(h, std::nullopt, false, 0, [&](int64_t b, int64_t tile, int64_t, void*, Runs) {
    kernels().step_energy(stored, f, b, tile);
  });
  return energy;
}

Tensor step_energy_backward(Tensor h, Tensor weights, Tensor grad) {
  Tensor owner;
  Steps f = steps_of(h, weights, owner);
  f.scale = *static_cast<const double*>(data_of("grad", grad, h, ScalarType::Double, {}));
  Tensor grad_h = empty(h, {h.size(0), f.T, f.k}, h.scalar_type());
  f.grad_h = grad_h.mutable_data_ptr();
  f.stream = use_streaming_stores(grad_h);
  const Dtype stored = dtype_of(h);
  for_each_tile(h, std::nullopt, false, 0, [&](int64_t b, int64_t tile, int64_t, void*, Runs) {
    kernels().step_energy_backward(stored, f, b, tile);
  });
  return grad_h;
}

// levels: [kPathLevels, k], from tsae_kernels/backends/two_state.py.
Tensor viterbi_path(Tensor z, Tensor levels, std::optional<Tensor> segments) {
  Tensor owner;
  Path f{};
  f.z = features("z", z, z, owner);
  f.T = z.size(1), f.k = z.size(2);
  f.levels = data_of("levels", levels, z, compute_type(z), {kPathLevels, f.k});
  Tensor on = empty(z, {z.size(0), f.T, f.k}, ScalarType::Bool);
  f.on = static_cast<uint8_t*>(on.mutable_data_ptr());
  const Dtype stored = dtype_of(z);
  const int64_t rows = kernels().path_rows(stored, f.T);
  for_each_tile(z, segments, false, rows, [&](int64_t b, int64_t tile, int64_t, void* scratch, Runs runs) {
    kernels().path(stored, f, runs, b, tile, scratch);
  });
  return on;
}

Tensor leaky_recurrence(Tensor a, Tensor decay, std::optional<Tensor> segments) {
  Tensor owner;
  Leaky f{};
  f.a = features("a", a, a, owner);
  f.T = a.size(1), f.k = a.size(2);
  f.decay = data_of("decay", decay, a, compute_type(a), {f.k});
  Tensor h = empty(a, {a.size(0), f.T, f.k}, a.scalar_type());
  f.h = h.mutable_data_ptr();
  f.stream = use_streaming_stores(h);
  const Dtype stored = dtype_of(a);
  for_each_tile(a, segments, false, 0, [&](int64_t b, int64_t tile, int64_t, void*, Runs runs) {
    kernels().leaky(stored, f, runs, b, tile);
  });
  return h;
}

// Without a and h, grad_decay is 0. It is returned before the sum over the batch, [B, k]; the caller sums it in a fixed
// order.
std::tuple<Tensor, Tensor> leaky_recurrence_backward(Tensor grad_h, Tensor decay, std::optional<Tensor> a,
                                                     std::optional<Tensor> h, std::optional<Tensor> segments) {
  STD_TORCH_CHECK(a.has_value() == h.has_value(), "a and h must be given together");
  Tensor owner, a_owner, h_owner;
  LeakyBackward f{};
  f.grad_h = features("grad_h", grad_h, grad_h, owner);
  if (a) f.a = features("a", *a, grad_h, a_owner), f.h = features("h", *h, grad_h, h_owner);
  const int64_t B = grad_h.size(0);
  f.T = grad_h.size(1), f.k = grad_h.size(2);
  const ScalarType dtype = compute_type(grad_h);
  f.decay = data_of("decay", decay, grad_h, dtype, {f.k});
  Tensor grad_a = empty(grad_h, {B, f.T, f.k}, grad_h.scalar_type()), grad_decay = empty(grad_h, {B, f.k}, dtype);
  f.grad_a = grad_a.mutable_data_ptr();
  f.stream = use_streaming_stores(grad_a);
  f.grad_decay = grad_decay.mutable_data_ptr();
  const Dtype stored = dtype_of(grad_h);
  for_each_tile(grad_h, segments, false, 0, [&](int64_t b, int64_t tile, int64_t, void*, Runs runs) {
    kernels().leaky_backward(stored, f, runs, b, tile);
  });
  return {grad_a, grad_decay};
}

}  // namespace
}  // namespace tsae

// Raise this with every change of an operator's signature, so that a library built from older sources is not used.
TSAE_EXPORT int tsae_interface() { return 7; }
TSAE_EXPORT const char* tsae_built_for() { return "torch " TORCH_VERSION ", " TSAE_COMPILER; }
TSAE_EXPORT const char* tsae_instruction_sets() {
#if defined(__x86_64__)
  return "baseline, avx2, avx512";
#else
  return "baseline";
#endif
}
TSAE_EXPORT const char* tsae_instruction_set() { return tsae::kernels().name; }

STABLE_TORCH_LIBRARY(tsae_kernels_cpp, library) { tsae::define_operators(library); }

STABLE_TORCH_LIBRARY_IMPL(tsae_kernels_cpp, CPU, library) {
  library.impl("forward", TORCH_BOX(&tsae::forward));
  library.impl("forward_counted", TORCH_BOX(&tsae::forward_counted));
  library.impl("backward", TORCH_BOX(&tsae::backward));
  library.impl("step_energy", TORCH_BOX(&tsae::step_energy));
  library.impl("step_energy_backward", TORCH_BOX(&tsae::step_energy_backward));
  library.impl("viterbi_path", TORCH_BOX(&tsae::viterbi_path));
  library.impl("leaky_recurrence", TORCH_BOX(&tsae::leaky_recurrence));
  library.impl("leaky_recurrence_backward", TORCH_BOX(&tsae::leaky_recurrence_backward));
}
