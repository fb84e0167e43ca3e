// The activations: relu with thresholds, the Schmitt trigger (docs/mathematics.md, section 7), gelu and its derivative.
#pragma once

#include "../shared/gelu_coefficients.h"
#include "../shared/schmitt_trigger.h"
#include "tile.cuh"

namespace tsae::cuda {

// Phi(z) and phi(z), distribution and density of the standard normal: gelu(z) = z Phi(z), gelu'(z) = Phi(z) + z phi(z).
struct Normal {
  float distribution, density;
};
__device__ __forceinline__ Normal normal(float z) {
  constexpr float P[] = TSAE_TAIL;
  const float magnitude = fabsf(z);
  const float exponential = fast_exponential(z * z * -0.5f);
  const float r = fast_reciprocal(1.f + TSAE_TAIL_SCALE * magnitude);
  float tail = P[8];
#pragma unroll 8
  for (int d = 7; d >= 0; --d) tail = fused(tail, r, P[d]);
  tail = tail * r * exponential;
  return {z > 0 ? 1.f - tail : tail, exponential * 0.398942280f};
}
struct Normal64 {
  double distribution, density;
};
__device__ __forceinline__ Normal64 normal(double z) {
  return {0.5 * (1 + erf(z * 0.70710678118654752440)), 0.39894228040143267794 * exp(-0.5 * z * z)};
}

// gelu(z), rounded to the stored type, and gelu'(z).
template <class T, class E = compute_of<T>>
struct Gelu {
  Stored<T> value;
  Pair<E> slope;
  __device__ __forceinline__ explicit Gelu(const Pair<E>& z) {
    const auto a = normal(z.a), b = normal(z.b);
    value = narrow<T>({z.a * a.distribution, z.b * b.distribution});
    slope = {a.distribution + z.a * a.density, b.distribution + z.b * b.density};
  }
};

// kThreshold: relu or the trigger, as Forward::release says, for kernels that are compiled once for both.
enum class Mode { kIdentity, kRelu, kSchmitt, kGelu, kThreshold };
template <Mode mode>
constexpr bool kHasThreshold = mode == Mode::kRelu || mode == Mode::kSchmitt || mode == Mode::kThreshold;

// The activation at one position after another. `held`: the trigger's release at this run's positions.
template <class T, Mode mode>
struct Activate {
  using E = compute_of<T>;
  using V = Pair<E>;
  V bias, threshold, release, held;
  const E* thresholds;  // per position, or null
  Mask off{true, true};

  __device__ __forceinline__ Activate(const Forward& f, const Place& place)
      : bias(f.bias ? load_numbers<E>(f.bias, place.j, place.count) : splat(-E(0))),  // adding -0 changes nothing
        threshold(f.threshold && !f.threshold_per_position ? load_numbers<E>(f.threshold, place.j, place.count) : V{}),
        // Nothing exceeds an infinite release, which leaves relu.
        release(mode == Mode::kThreshold && !f.release ? splat(E(INFINITY))
                : mode == Mode::kSchmitt || mode == Mode::kThreshold
                    ? load_numbers<E>(f.release, place.j, place.count)
                    : V{}),
        thresholds(f.threshold_per_position ? static_cast<const E*>(f.threshold) + place.b * f.T : nullptr) {}

  __device__ __forceinline__ void start(const Run& run) {
    off = {true, true};
    // At excluded positions no state carries over.
    held = run.excluded ? splat(E(INFINITY)) : release;
  }
  // `limit`: the threshold at this position.
  __device__ __forceinline__ Stored<T> operator()(const Stored<T>& pre, const V& limit) {
    V z = widen<T>(pre) + bias;
    if constexpr (mode == Mode::kGelu) return Gelu<T>(z).value;
    if constexpr (kHasThreshold<mode>) {
      if constexpr (mode == Mode::kRelu) off = less_equal(z, limit);
      else off = stays_off(z, limit, held, off);
      z = select(off, V{}, z);
    }
    return narrow<T>(z);
  }
};

}  // namespace tsae::cuda
