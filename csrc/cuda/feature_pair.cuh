// Pair, two adjacent features at one position, which is what one thread processes: arithmetic and conversions.
#pragma once

#ifndef TSAE_DEVICE_HEADER
#define TSAE_DEVICE_HEADER "device.cuh"
#endif
#include TSAE_DEVICE_HEADER

#include "../shared/dtypes.h"
#include "../shared/recurrence.h"
#include "kernels.h"

namespace tsae::cuda {

using namespace tsae::TSAE_TARGET;

template <class E>
struct Pair {
  E a, b;
};
using Mask = Pair<bool>;

#define TSAE_OPERATOR(op)                                             \
  template <class E>                                                  \
  TSAE_INLINE Pair<E> operator op(const Pair<E>& x, const Pair<E>& y) { \
    return {x.a op y.a, x.b op y.b};                                  \
  }
TSAE_OPERATOR(+)
TSAE_OPERATOR(-)
TSAE_OPERATOR(*)
#undef TSAE_OPERATOR

template <class E>
TSAE_INLINE Pair<E> operator-(const Pair<E>& x) {
  return {-x.a, -x.b};
}
template <class E>
TSAE_INLINE Pair<E> operator*(const Pair<E>& x, E y) {
  return {x.a * y, x.b * y};
}
TSAE_INLINE Mask operator&(const Mask& x, const Mask& y) { return {x.a && y.a, x.b && y.b}; }
TSAE_INLINE Mask operator|(const Mask& x, const Mask& y) { return {x.a || y.a, x.b || y.b}; }

template <class E>
TSAE_INLINE Mask less_equal(const Pair<E>& x, const Pair<E>& y) {
  return {x.a <= y.a, x.b <= y.b};
}
template <class E>
TSAE_INLINE Mask less(const Pair<E>& x, const Pair<E>& y) {
  return {x.a < y.a, x.b < y.b};
}
template <class E>
TSAE_INLINE Mask equal(const Pair<E>& x, const Pair<E>& y) {
  return {x.a == y.a, x.b == y.b};
}
template <class E>
TSAE_INLINE Mask not_equal(const Pair<E>& x, const Pair<E>& y) {
  return {x.a != y.a, x.b != y.b};
}
template <class E>
TSAE_INLINE Pair<E> select(const Mask& mask, const Pair<E>& x, const Pair<E>& y) {
  return {mask.a ? x.a : y.a, mask.b ? x.b : y.b};
}
template <class E>
TSAE_INLINE Pair<E> splat(E x) {
  return {x, x};
}

// x * y + z, rounded once. Explicit where two kernels must give the same bits.
template <class E>
__device__ __forceinline__ Pair<E> fused(const Pair<E>& x, const Pair<E>& y, const Pair<E>& z) {
  return {fused(x.a, y.a, z.a), fused(x.b, y.b, z.b)};
}
template <class E>
__device__ __forceinline__ Pair<E> fused(const Pair<E>& x, E y, const Pair<E>& z) {
  return {fused(x.a, y, z.a), fused(x.b, y, z.b)};
}

// Two adjacent features as stored in memory.
template <class T>
struct alignas(2 * sizeof(T)) Stored {
  T a, b;
};
template <>
struct alignas(4) Stored<BFloat16> {
  uint32_t word;
};
template <>
struct alignas(4) Stored<Half> {
  uint32_t word;
};

template <class T>
__device__ __forceinline__ Pair<compute_of<T>> widen(const Stored<T>& x) {
  return {x.a, x.b};
}
template <>
__device__ __forceinline__ Pair<float> widen(const Stored<BFloat16>& x) {
  Pair<float> out;
  widen_bfloat16(x.word, out.a, out.b);
  return out;
}
template <>
__device__ __forceinline__ Pair<float> widen(const Stored<Half>& x) {
  Pair<float> out;
  widen_half(x.word, out.a, out.b);
  return out;
}

template <class T>
__device__ __forceinline__ Stored<T> narrow(const Pair<compute_of<T>>& x) {
  if constexpr (sizeof(T) > 2) return {x.a, x.b};
  else if constexpr (__is_same(T, Half)) return {narrow_half(x.a, x.b)};
  else return {narrow_bfloat16(x.a, x.b)};
}

template <class T>
__device__ __forceinline__ Stored<T> stored_from(const T& a, const T& b) {
  if constexpr (sizeof(T) > 2) return {a, b};
  else return {uint32_t(a.bits) | uint32_t(b.bits) << 16};
}
template <class T>
__device__ __forceinline__ T first_of(const Stored<T>& x) {
  if constexpr (sizeof(T) > 2) return x.a;
  else return {uint16_t(x.word & 0xffffu)};
}
template <class T>
__device__ __forceinline__ T second_of(const Stored<T>& x) {
  if constexpr (sizeof(T) > 2) return x.b;
  else return {uint16_t(x.word >> 16)};
}

// Whether each feature is not 0; NaN is not.
template <class T>
__device__ __forceinline__ Mask nonzero(const Stored<T>& x) {
  if constexpr (sizeof(T) > 2) return {x.a != 0, x.b != 0};
  else return {(x.word & 0x7fffu) != 0, (x.word & 0x7fff0000u) != 0};
}

}  // namespace tsae::cuda

template <class E>
struct tsae::TSAE_TARGET::ElementOf<tsae::cuda::Pair<E>> {
  using type = E;
};
