// gelu and its gradient on packs: the standard normal distribution and density.
#pragma once

#include "../shared/gelu_coefficients.h"
#include "simd.h"

namespace tsae {
namespace TSAE_TARGET {

// Phi(z) and phi(z), distribution and density of the standard normal: gelu(z) = z Phi(z), gelu'(z) = Phi(z) + z phi(z).
template <class E>
struct Normal {
  Pack<E> distribution, density;
};

TSAE_INLINE Normal<double> normal(const Pack<double>& z) {
  Normal<double> out;
  for (int i = 0; i < kVectors; ++i) {
    for (int lane = 0; lane < Pack<double>::lanes; ++lane) {
      const double x = z.v[i][lane];
      out.distribution.v[i][lane] = 0.5 * (1 + __builtin_erf(x * 0.70710678118654752440));
      out.density.v[i][lane] = 0.39894228040143267794 * __builtin_exp(-0.5 * x * x);
    }
  }
  return out;
}

// In float both are computed from exp(-z^2/2), see gelu_coefficients.h.
TSAE_INLINE Normal<float> normal(const Pack<float>& z) {
  constexpr float P[] = TSAE_TAIL;
  constexpr float reciprocals[] = {1 / 720.f, 1 / 120.f, 1 / 24.f, 1 / 6.f, 0.5f, 1.f, 1.f};  // of factorials
  Normal<float> out;
  TSAE_EACH_VECTOR {
    const Floats zero{}, x = z.v[i], magnitude = x < zero ? -x : x;
    const Floats exponent = x * x * -0.5f;
    const Floats u = exponent < -87.f ? zero - 87.f : exponent;  // below -87 exp is subnormal: set to 0 below
    // exp(u) = 2^n exp(u - n ln 2); adding 1.5 * 2^23 rounds to an integer, which is then in the low bits.
    const Floats shifted = u * 1.44269504f + 12582912.f, n = shifted - 12582912.f;
    const Floats rest = (u - n * 0.693145752f) - n * 1.42860677e-6f;
    Floats exponential = zero + reciprocals[0];
    _Pragma("GCC unroll 6") for (int d = 1; d < 7; ++d) exponential = exponential * rest + reciprocals[d];
    exponential = exponential * floats_of((bits_of(shifted) << 23) + 0x3f800000u);
    exponential = exponent < -87.f ? zero : exponential;

    const Floats r = 1.f / (1.f + TSAE_TAIL_SCALE * magnitude);
    Floats tail = zero + P[8];
    _Pragma("GCC unroll 8") for (int d = 7; d >= 0; --d) tail = tail * r + P[d];
    tail = tail * r * exponential;
    out.distribution.v[i] = x > zero ? 1.f - tail : tail;
    out.density.v[i] = exponential * 0.398942280f;
  }
  return out;
}

}  // namespace TSAE_TARGET
}  // namespace tsae
