// The weighted energy of steps along T, sum over b, t, j of weights[b, t] (h[b, t+1, j] - h[b, t, j])^2 (TC-SAE's
// window loss), and its gradient. One pass along T with the previous row in registers. docs/mathematics.md, section 6.
#include "tile.cuh"

namespace tsae::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kStepThreads) step_energy_kernel(const __grid_constant__ Steps f) {
  using E = compute_of<T>;
  using V = Pair<E>;
  const Place place = place_of(f.k, 2 * kStepThreads);
  const Column<T> h(f.h, place);
  const E* weights = static_cast<const E*>(f.weights) + place.b * f.T;
  double energy = 0;
  V before = h(0);
  for (int begin = 1; begin < f.T; begin += kBlock) {
    V part{};
#pragma unroll 8
    for (int t = begin; t < smaller(begin + kBlock, f.T); ++t) {
      const V now = h(t), step = now - before;
      const E weight = weights[t - 1];
      if (weight != 0) part = part + step * step * weight;  // a pair of zero weight may be NaN
      before = now;
    }
    energy += double(part.a) + double(part.b);
  }
  double* sums = reinterpret_cast<double*>(shared_memory());  // [kStepThreads], summed in a fixed order
  sums[threadIdx.x] = energy;
  __syncthreads();
  for (int half = kStepThreads / 2; half > 0; half /= 2) {
    if (int(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) f.energy[blockIdx.x] = sums[0];
}

template <class T>
__global__ void __launch_bounds__(kStepThreads) step_gradient_kernel(const __grid_constant__ Steps f) {
  using E = compute_of<T>;
  using V = Pair<E>;
  const Place place = place_of(f.k, 2 * kStepThreads);
  if (place.count == 0) return;
  const Column<T> h(f.h, place);
  const E* weights = static_cast<const E*>(f.weights) + place.b * f.T;
  const double scale = 2 * *f.grad;
  const Output<T> grad_h(f.grad_h, f.T, f.k, f.paired, place);
  V now = h(0), from_before{};
#pragma unroll 8
  for (int t = 0; t < f.T; ++t) {
    V from_after{};
    if (t + 1 < f.T) {
      const V next = h(t + 1);
      const E weight = weights[t];
      if (weight != 0) from_after = (next - now) * E(scale * weight);
      now = next;
    }
    grad_h(t, narrow<T>(from_before - from_after));
    from_before = from_after;
  }
}

template <class T>
const char* energy_of(const Steps& f, void* stream) {
  const int64_t bytes = kStepThreads * sizeof(double);
  return launch(step_energy_kernel<T>, f.B * blocks_of_steps(f.k), kStepThreads, bytes, stream, f);
}
template <class T>
const char* gradient_of(const Steps& f, void* stream) {
  return launch(step_gradient_kernel<T>, f.B * blocks_of_steps(f.k), kStepThreads, 0, stream, f);
}

}  // namespace

const char* step_energy(const Steps& f, void* stream) {
  return with_dtype(f.dtype, [&](auto element) { return energy_of<decltype(element)>(f, stream); });
}
const char* step_energy_backward(const Steps& f, void* stream) {
  return with_dtype(f.dtype, [&](auto element) { return gradient_of<decltype(element)>(f, stream); });
}

}  // namespace tsae::cuda
