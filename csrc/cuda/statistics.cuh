// The temporal statistics of one thread's two features over one segment. docs/mathematics.md, sections 2 to 4.
#pragma once

#include "tile.cuh"

namespace tsae::cuda {

// The sums over a segment, with y = x - centre.
template <class V>
struct Sums {
  V near{}, far{};  // -1/2 D of the bands (1, 3) and (4, 15)
  V first{}, second{};  // of y and y^2
};

// ---- the tuned case: bands (1, 3), (4, 15) and one more -----------------------------------------------------------
//
// One pass over the segment, 16 rows at a time. The last 16 rows stay in registers (ring[i] is y of the latest row that
// is i mod 16), so each row is read from shared memory once. Rows before the segment are zeros in the ring and need no
// test. Operations per feature and row: the read (half an instruction, and a conversion for 16 bits), 1 to centre, 2 +
// 2 additions for the windows, 4 multiply-adds for the bands and 2 for the sums.

constexpr int kRows = 16;
constexpr int kNearLast = 3, kFarLast = 15;

enum class Zone {
  kHead,      // the segment's first rows, if it has at least 32
  kInterior,  // all windows are complete
  kTail,      // its last 16 rows
  kAnywhere,  // in a segment too short for the others, or with fewer than 16 rows left
};

// Half the number of rows at offsets first to last before and after row t = begin + i.
template <Zone zone, class E>
__device__ __forceinline__ E half_degree(int i, int t, int n, int first, int last) {
  if constexpr (zone == Zone::kInterior) return E(last - first + 1);
  if constexpr (zone == Zone::kTail) i = kRows - 1 - i;  // from the end: the mirror image of the head
  if constexpr (zone == Zone::kAnywhere) {
    return E(0.5) * E(window_count(t, n, last) - window_count(t, n, first - 1));
  } else {
    return E(0.5) * E(last - first + 1 + smaller(i, last) - smaller(i, first - 1));
  }
}

template <Zone zone, class Rows, class V>
__device__ __forceinline__ void walk_rows(const Rows& y, int begin, int n, V (&ring)[kRows], V& far, Sums<V>& sums) {
  using E = element_of<V>;
  Sums<V> part;
#pragma unroll 16
  for (int i = 0; i < kRows; ++i) {
    const int t = begin + i;
    V now{};
    if (zone != Zone::kAnywhere || t < n) now = y(t);
    const V near = (ring[(i + 15) % kRows] + ring[(i + 14) % kRows]) + ring[(i + 13) % kRows];
    far = far + (ring[(i + 12) % kRows] - ring[i]);  // y[t - 4] enters, y[t - 16] leaves
    // Taking the difference first keeps the terms of a slowly changing feature small (docs/mathematics.md, section 4).
    part.near = fused(now, fused(now, -half_degree<zone, E>(i, t, n, 1, kNearLast), near), part.near);
    part.far = fused(now, fused(now, -half_degree<zone, E>(i, t, n, kNearLast + 1, kFarLast), far), part.far);
    part.first = part.first + now;
    part.second = fused(now, now, part.second);
    ring[i] = now;
  }
  sums.near = sums.near + part.near;
  sums.far = sums.far + part.far;
  sums.first = sums.first + part.first;
  sums.second = sums.second + part.second;
}

template <class V, class Rows>
__device__ __forceinline__ Sums<V> walk_multiscale(const Rows& y, int n) {
  V ring[kRows] = {};
  V far{};  // the sum of y over [t - 15, t - 4]
  Sums<V> sums;
  int begin = 0;
  if (n >= 2 * kRows) {
    walk_rows<Zone::kHead>(y, 0, n, ring, far, sums);
    for (begin = kRows; begin + 2 * kRows - 1 <= n; begin += kRows) {
      if (begin % kBlock == 0) {  // stops rounding errors from accumulating
        far = V{};
#pragma unroll 12
        for (int i = 0; i <= kFarLast - kNearLast - 1; ++i) far = far + ring[i];
      }
      walk_rows<Zone::kInterior>(y, begin, n, ring, far, sums);
    }
    if (n - begin == kRows) {
      walk_rows<Zone::kTail>(y, begin, n, ring, far, sums);
      begin = n;
    }
  }
  for (; begin < n; begin += kRows) walk_rows<Zone::kAnywhere>(y, begin, n, ring, far, sums);
  return sums;
}

// The third band, which begins at 16. If it has all remaining offsets it is all pairs minus the other bands, which is
// safe for n >= 8 * 15 (docs/mathematics.md, section 3).
template <class V, class Rows>
__device__ __forceinline__ V third_band(const Rows& y, int n, int last, const V& near, const V& far, const Sums<V>& sums) {
  using E = element_of<V>;
  if (last < n - 1 || n < 8 * kFarLast) return band_energy<V>(y, n, kFarLast + 1, last);
  const V all = fused(sums.second, E(n), (V{} - sums.first) * sums.first);
  return (all - near) - far;
}

// ---- any bands ----------------------------------------------------------------------------------------------------

template <class V, class Rows>
__device__ __forceinline__ Sums<V> walk_moments(const Rows& y, int n) {
  Sums<V> sums;
  for (int begin = 0; begin < n; begin += kBlock) {
    const int end = smaller(begin + kBlock, n);
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
  return sums;
}

// ---- both ---------------------------------------------------------------------------------------------------------

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

}  // namespace tsae::cuda
