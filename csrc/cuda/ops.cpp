// The operators of the `cuda` backend, on PyTorch's stable ABI: the same operators as in csrc/cpu/ops.cpp, for tensors
// on a GPU. tsae_kernels/backends/compiled.py calls them; the public operators, with autograd and fake implementations,
// are in tsae_kernels/ops.py. Nothing here waits for the GPU or reads data on it.
#include <tuple>

#include "../shared/arguments.h"
#include "kernels.h"

// Provides CurrentStream, and the library's name and dispatch key; the tests replace it along with the device.
#ifndef TSAE_STREAM_HEADER
#define TSAE_STREAM_HEADER "stream.h"
#endif
#include TSAE_STREAM_HEADER

namespace tsae::cuda {
namespace {

using OptionalTensor = std::optional<Tensor>;

void check_launch(const char* error) {
  STD_TORCH_CHECK(!error, "tsae_kernels: a CUDA kernel launch failed: ", error, ". The library was built for ",
                  architectures(), "; set TORCH_CUDA_ARCH_LIST when building it for other architectures.");
}

bool divides(int64_t size, const void* address, std::initializer_list<int64_t> byte_strides) {
  bool all = reinterpret_cast<uintptr_t>(address) % size == 0;
  for (int64_t stride : byte_strides) all = all && stride % size == 0;
  return all;
}

Source source(const char* name, const Tensor& x, const Tensor& like, Tensor& owner) {
  Source out;
  out.x = features(name, x, like, owner);
  const int64_t size = x.element_size(), batch = out.x.batch * size, time = out.x.time * size;
  const bool adjacent = out.x.feature == 1;
  out.vectorized = adjacent && divides(16, out.x.data, {batch, time, like.size(2) * size}) && time < (1 << 27);
  out.paired = adjacent && divides(2 * size, out.x.data, {batch, time});
  return out;
}

// Whether two adjacent features of a contiguous [..., k] result can be written in one store. PyTorch's allocations are
// aligned.
bool even(int64_t k) { return k % 2 == 0; }

int copy_bands(const Sizes& bands, int64_t T, int* to) {
  STD_TORCH_CHECK(bands.size() <= 2 * kMostBands, "bands: the cuda backend takes at most ", kMostBands, ", got ",
                  bands.size() / 2);
  const std::vector<int> limited = limited_bands(bands, T);
  std::copy(limited.begin(), limited.end(), to);
  return int(limited.size() / 2);
}

// Segment ends [B, T], owned by `owner`, which must outlive the launches; null without segments.
const int* ends_of(const OptionalTensor& segments, const Tensor& x, Tensor& owner, void* stream) {
  const int64_t B = x.size(0), T = x.size(1);
  const void* ids = data_of("segments", segments, x, ScalarType::Long, {B, T});
  if (!ids || B == 0) return nullptr;
  owner = empty(x, {B, T}, ScalarType::Int);
  int* ends = static_cast<int*>(owner.mutable_data_ptr());
  check_launch(find_segment_ends(static_cast<const int64_t*>(ids), B, int(T), ends, stream));
  return ends;
}

enum class Written { kStatistics, kFeatures, kMask };

using Uncounted = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Counted = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// The first result is h, the mask of active features, or empty; the last one nothing unless `counted`.
Counted run_forward(Tensor pre, OptionalTensor bias, int64_t activation, OptionalTensor threshold,
                    OptionalTensor release, Sizes bands, OptionalTensor segments, Written written, bool counted) {
  const CurrentStream stream(pre);
  Tensor owner, runs;
  Forward f{};
  f.pre = source("pre", pre, pre, owner);
  f.B = pre.size(0), f.T = int(pre.size(1)), f.k = pre.size(2);
  f.dtype = dtype_of(pre);
  f.activation = checked_activation(activation);
  f.S = copy_bands(bands, f.T, f.bands);
  const ScalarType dtype = compute_type(pre);
  f.bias = data_of("bias", bias, pre, dtype, {f.k});
  f.threshold_per_position = threshold && threshold->dim() == 2;
  f.threshold = data_of("threshold", threshold, pre, dtype, f.threshold_per_position ? Sizes{f.B, f.T} : Sizes{f.k});
  f.release = data_of("release", release, pre, dtype, {f.k});
  f.ends = ends_of(segments, pre, runs, stream.get());
  f.words = (f.T + 31) / 32;
  Tensor transitions = empty(pre, counted ? Sizes{f.B, 3, f.k} : Sizes{0}, ScalarType::Int);
  f.transitions = counted ? transitions.mutable_data_ptr() : nullptr;
  const bool mask = written == Written::kMask, with_h = written == Written::kFeatures || (mask && !is_tuned_forward(f));
  Tensor h = empty(pre, with_h ? Sizes{f.B, f.T, f.k} : Sizes{0}, pre.scalar_type());
  Tensor active = empty(pre, mask ? Sizes{f.B, f.words, f.k} : Sizes{0}, ScalarType::Int);
  Tensor differences = empty(pre, {f.B, f.S, f.k}, dtype), total = empty(pre, {f.B, f.k}, dtype),
         square = empty(pre, {f.B, f.k}, dtype);
  f.paired = even(f.k);
  f.h = with_h ? h.mutable_data_ptr() : nullptr;
  f.active = mask ? active.mutable_data_ptr() : nullptr;
  f.differences = differences.mutable_data_ptr();
  f.total = total.mutable_data_ptr();
  f.square = square.mutable_data_ptr();
  check_launch(forward(f, stream.get()));
  return {mask ? active : h, differences, total, square, transitions};
}

Uncounted without_counts(const Counted& results) {
  const auto& [written, differences, total, square, transitions] = results;
  return {written, differences, total, square};
}

// If `with_h` is false, h is an empty tensor.
Uncounted forward_op(Tensor pre, OptionalTensor bias, int64_t activation, OptionalTensor threshold,
                     OptionalTensor release, Sizes bands, OptionalTensor segments, bool with_h) {
  const Written written = with_h ? Written::kFeatures : Written::kStatistics;
  return without_counts(run_forward(pre, bias, activation, threshold, release, bands, segments, written, false));
}
Counted forward_counted_op(Tensor pre, OptionalTensor bias, int64_t activation, OptionalTensor threshold,
                           OptionalTensor release, Sizes bands, OptionalTensor segments, bool with_h) {
  const Written written = with_h ? Written::kFeatures : Written::kStatistics;
  return run_forward(pre, bias, activation, threshold, release, bands, segments, written, true);
}

// relu with the mask of its active features, int32 [B, ceil(T / 32), k], instead of h: bit i of word w is position
// 32 w + i. Where no tuned kernel applies, h is computed on the way.
Uncounted forward_with_mask_op(Tensor pre, OptionalTensor bias, OptionalTensor threshold, OptionalTensor release,
                               Sizes bands, OptionalTensor segments) {
  return without_counts(run_forward(pre, bias, kRelu, threshold, release, bands, segments, Written::kMask, false));
}
Counted forward_with_mask_counted_op(Tensor pre, OptionalTensor bias, OptionalTensor threshold, OptionalTensor release,
                                     Sizes bands, OptionalTensor segments) {
  return run_forward(pre, bias, kRelu, threshold, release, bands, segments, Written::kMask, true);
}

// `grad_differences` is [1 or B, S, k]. The second result is grad_bias before the sum over the batch, [B, k]; the
// caller sums it in a fixed order. `total`: the statistic of the saved features' h, if it is known.
std::tuple<Tensor, Tensor> backward_op(Tensor saved, OptionalTensor bias, OptionalTensor grad_h,
                                       OptionalTensor grad_differences, OptionalTensor grad_total,
                                       OptionalTensor grad_square, int64_t activation, Sizes bands,
                                       OptionalTensor segments, OptionalTensor total) {
  const CurrentStream stream(saved);
  Tensor owner, grad_owner, runs;
  Backward f{};
  f.saved = source("saved", saved, saved, owner);
  if (grad_h) f.grad_h = source("grad_h", *grad_h, saved, grad_owner);
  f.B = saved.size(0), f.T = int(saved.size(1)), f.k = saved.size(2);
  f.dtype = dtype_of(saved);
  f.activation = checked_activation(activation);
  f.S = copy_bands(bands, f.T, f.bands);
  const ScalarType dtype = compute_type(saved);
  f.bias = data_of("bias", bias, saved, dtype, {f.k});
  const bool shared = grad_differences && f.B != 1 && grad_differences->size(0) == 1;
  f.grad_differences = data_of("grad_differences", grad_differences, saved, dtype, {shared ? 1 : f.B, f.S, f.k});
  f.differences_batch = shared ? 0 : f.S * f.k;
  f.grad_total = data_of("grad_total", grad_total, saved, dtype, {f.B, f.k});
  f.grad_square = data_of("grad_square", grad_square, saved, dtype, {f.B, f.k});
  f.total = data_of("total", total, saved, dtype, {f.B, f.k});
  f.ends = ends_of(segments, saved, runs, stream.get());
  const std::vector<BackwardWindow> windows = backward_windows(limited_bands(bands, f.T));
  std::copy(windows.begin(), windows.end(), f.windows);
  f.number_of_windows = int(windows.size());
  Tensor grad_pre = empty(saved, {f.B, f.T, f.k}, saved.scalar_type()), grad_bias = empty(saved, {f.B, f.k}, dtype);
  f.paired = even(f.k);
  f.grad_pre = grad_pre.mutable_data_ptr();
  f.grad_bias = grad_bias.mutable_data_ptr();
  check_launch(backward(f, stream.get()));
  return {grad_pre, grad_bias};
}

Steps steps_of(const Tensor& h, const Tensor& weights, Tensor& owner) {
  Steps f{};
  f.h = source("h", h, h, owner);
  f.B = h.size(0), f.T = int(h.size(1)), f.k = h.size(2);
  f.dtype = dtype_of(h);
  f.weights = data_of("weights", weights, h, compute_type(h), {f.B, f.T});
  f.paired = even(f.k);
  return f;
}

// The energy of every block, [B, blocks] float64; the caller sums it in a fixed order.
Tensor step_energy_op(Tensor h, Tensor weights) {
  const CurrentStream stream(h);
  Tensor owner;
  Steps f = steps_of(h, weights, owner);
  Tensor energy = empty(h, {f.B, blocks_of_steps(f.k)}, ScalarType::Double);
  f.energy = static_cast<double*>(energy.mutable_data_ptr());
  check_launch(step_energy(f, stream.get()));
  return energy;
}

Tensor step_energy_backward_op(Tensor h, Tensor weights, Tensor grad) {
  const CurrentStream stream(h);
  Tensor owner;
  Steps f = steps_of(h, weights, owner);
  f.grad = static_cast<const double*>(data_of("grad", grad, h, ScalarType::Double, {}));
  Tensor grad_h = empty(h, {f.B, f.T, f.k}, h.scalar_type());
  f.grad_h = grad_h.mutable_data_ptr();
  check_launch(step_energy_backward(f, stream.get()));
  return grad_h;
}

const int64_t* ids_of(const OptionalTensor& segments, const Tensor& x) {
  return static_cast<const int64_t*>(data_of("segments", segments, x, ScalarType::Long, {x.size(0), x.size(1)}));
}

// levels: [kPathLevels, k], from tsae_kernels/backends/two_state.py.
Tensor viterbi_path_op(Tensor z, Tensor levels, OptionalTensor segments) {
  const CurrentStream stream(z);
  Tensor owner;
  Path f{};
  f.z = source("z", z, z, owner);
  f.B = z.size(0), f.T = int(z.size(1)), f.k = z.size(2);
  f.dtype = dtype_of(z);
  f.levels = data_of("levels", levels, z, compute_type(z), {kPathLevels, f.k});
  f.ids = ids_of(segments, z);
  f.paired = even(f.k);
  f.words = (f.T + kPathPositions - 1) / kPathPositions;
  Tensor decisions = empty(z, {f.B, f.words, f.k}, ScalarType::Int), on = empty(z, {f.B, f.T, f.k}, ScalarType::Bool);
  f.decisions = decisions.mutable_data_ptr();
  f.on = on.mutable_data_ptr();
  check_launch(viterbi_path(f, stream.get()));
  return on;
}

Tensor leaky_recurrence_op(Tensor a, Tensor decay, OptionalTensor segments) {
  const CurrentStream stream(a);
  Tensor owner;
  Leaky f{};
  f.a = source("a", a, a, owner);
  f.B = a.size(0), f.T = int(a.size(1)), f.k = a.size(2);
  f.dtype = dtype_of(a);
  f.decay = data_of("decay", decay, a, compute_type(a), {f.k});
  f.ids = ids_of(segments, a);
  f.paired = even(f.k);
  Tensor h = empty(a, {f.B, f.T, f.k}, a.scalar_type());
  f.h = h.mutable_data_ptr();
  check_launch(leaky_recurrence(f, stream.get()));
  return h;
}

// Without a and h, grad_decay is 0. It is returned before the sum over the batch, [B, k]; the caller sums it in a fixed
// order.
std::tuple<Tensor, Tensor> leaky_recurrence_backward_op(Tensor grad_h, Tensor decay, OptionalTensor a, OptionalTensor h,
                                                        OptionalTensor segments) {
  STD_TORCH_CHECK(a.has_value() == h.has_value(), "a and h must be given together");
  const CurrentStream stream(grad_h);
  Tensor owner, a_owner, h_owner;
  LeakyBackward f{};
  f.grad_h = source("grad_h", grad_h, grad_h, owner);
  if (a) f.a = source("a", *a, grad_h, a_owner), f.h = source("h", *h, grad_h, h_owner);
  f.B = grad_h.size(0), f.T = int(grad_h.size(1)), f.k = grad_h.size(2);
  f.dtype = dtype_of(grad_h);
  const ScalarType dtype = compute_type(grad_h);
  f.decay = data_of("decay", decay, grad_h, dtype, {f.k});
  f.ids = ids_of(segments, grad_h);
  f.paired = even(f.k);
  Tensor grad_a = empty(grad_h, {f.B, f.T, f.k}, grad_h.scalar_type()), grad_decay = empty(grad_h, {f.B, f.k}, dtype);
  f.grad_a = grad_a.mutable_data_ptr();
  f.grad_decay = grad_decay.mutable_data_ptr();
  check_launch(leaky_recurrence_backward(f, stream.get()));
  return {grad_a, grad_decay};
}

}  // namespace
}  // namespace tsae::cuda

// Raise this with every change of an operator's signature, so that a library built from older sources is not used.
TSAE_EXPORT int tsae_interface() { return 7; }
TSAE_EXPORT const char* tsae_built_for() { return "torch " TORCH_VERSION ", " TSAE_COMPILER; }
TSAE_EXPORT const char* tsae_cuda_version() { return tsae::cuda::built_for(); }
TSAE_EXPORT const char* tsae_architectures() { return tsae::cuda::architectures(); }

#define TSAE_DEFINE_LIBRARY(name) STABLE_TORCH_LIBRARY(name, library)  // expands the name first
TSAE_DEFINE_LIBRARY(TSAE_LIBRARY) {
  tsae::define_operators(library);
  library.def(
      "forward_with_mask(Tensor pre, Tensor? bias, Tensor? threshold, Tensor? release, int[] bands, Tensor? segments) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "forward_with_mask_counted(Tensor pre, Tensor? bias, Tensor? threshold, Tensor? release, int[] bands, "
      "Tensor? segments) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(TSAE_LIBRARY, TSAE_DISPATCH_KEY, library) {
  library.impl("forward", TORCH_BOX(&tsae::cuda::forward_op));
  library.impl("forward_counted", TORCH_BOX(&tsae::cuda::forward_counted_op));
  library.impl("forward_with_mask", TORCH_BOX(&tsae::cuda::forward_with_mask_op));
  library.impl("forward_with_mask_counted", TORCH_BOX(&tsae::cuda::forward_with_mask_counted_op));
  library.impl("backward", TORCH_BOX(&tsae::cuda::backward_op));
  library.impl("step_energy", TORCH_BOX(&tsae::cuda::step_energy_op));
  library.impl("step_energy_backward", TORCH_BOX(&tsae::cuda::step_energy_backward_op));
  library.impl("viterbi_path", TORCH_BOX(&tsae::cuda::viterbi_path_op));
  library.impl("leaky_recurrence", TORCH_BOX(&tsae::cuda::leaky_recurrence_op));
  library.impl("leaky_recurrence_backward", TORCH_BOX(&tsae::cuda::leaky_recurrence_backward_op));
}
