// Sums of one thread's two features over one segment, and the results' last steps. docs/mathematics.md, section 4.
#pragma once

#include "tile.cuh"

namespace tsae::cuda {

// The sums over a segment, with y = x - centre.
template <class V>
struct Sums {
  V first{}, second{};  // of y and y^2
};

// Adds rows [begin, end) of a segment: at most kBlock, so that rounding errors do not accumulate.
template <class V, class Rows>
__device__ __forceinline__ void add_block(const Rows& y, int begin, int end, Sums<V>& sums) {
  Sums<V> part;
#pragma unroll 8
  for (int t = begin; t < end; ++t) {
    const V now = y(t);
    part.first = part.first + now;
    part.second = fused(now, now, part.second);
  }
  sums.first = sums.first + part.first;
  sums.second = sums.second + part.second;
}

template <class V>
__device__ __forceinline__ V not_a_number_to(const V& instead, const V& x) {
  return select(equal(x, x), x, instead);
}

// Adds the segment's sums of x * kSumScale and of x^2 to `total` and `square`.
template <class V, class Rows>
__device__ __forceinline__ void add_moments(const Rows& x, int n, const V& scaled_centre, const Sums<V>& sums, V& total,
                                            V& square) {
  using E = element_of<V>;
  const V centre = scaled_centre * kInverseSumScale<E>;
  V first = fused(sums.first, kSumScale<E>, scaled_centre * E(n));
  // sum x^2 = sum y^2 + centre (2 sum y + n centre)
  V second = fused(centre, fused(sums.first, E(2), centre * E(n)), sums.second);
  // Near the end of the dtype's range y can overflow to inf, and the result to NaN: then sum x itself.
  const V zero{};
  const Mask finite = equal(first - first, zero) & equal(second - second, zero);
  if (!(finite.a && finite.b)) {
    V plain{}, squared{};
    for (int begin = 0; begin < n; begin += kBlock) {
      V part{}, part_squared{};
      for (int t = begin; t < smaller(begin + kBlock, n); ++t) {
        const V now = x(t);
        part = fused(now, kSumScale<E>, part);
        part_squared = fused(now, now, part_squared);
      }
      plain = plain + part;
      squared = squared + part_squared;
    }
    first = select(finite, first, plain);
    second = select(finite, second, squared);
  }
  total = total + first;
  square = square + second;
}

// The final value of a sum of squares. Rounding can make it negative, and overflowing squares can give inf - inf = NaN.
// Unless a feature is NaN (then `square` is too), the true value is then infinite.
template <class V>
__device__ __forceinline__ V finished_energy(const V& energy, const V& square) {
  using E = element_of<V>;
  const V zero{}, infinity = splat(E(INFINITY));
  const V positive = select(less_equal(energy, zero), zero, energy);
  return not_a_number_to(select(equal(square, square), infinity, energy), positive);
}

// Writes the sums of a complete sequence.
template <class E>
__device__ __forceinline__ void write_moments(const Forward& f, const Place& place, const Pair<E>& total,
                                              const Pair<E>& square) {
  const int64_t at = place.b * f.k + place.j;
  store_numbers(f.total, at, total, f.paired, place.count);
  store_numbers(f.square, at, square, f.paired, place.count);
}

}  // namespace tsae::cuda
