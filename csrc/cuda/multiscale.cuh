// The statistics of the tuned case, bands (1, 3), (4, 15) and one more: of one thread's two features over one segment,
// in blocks of 16 rows. docs/mathematics.md, sections 2 to 4.
//
// The last 16 rows stay in registers, so a row is read from shared memory once (and once more when it leaves the third
// band's window). Operations per feature and row of an interior block: half a read, a conversion for 16 bits, 1 to
// centre, 3.5 additions for the windows, 3 multiply-adds for the bands and 1 for the sum of squares.
#pragma once

#include "row_ring.cuh"
#include "statistics.cuh"

namespace tsae::cuda {

constexpr int kNearLast = 3, kFarLast = 15;

// Rows are scaled by this power of two, exactly, when they are centred: no sum of a block overflows, even for bfloat16 of
// 3e38, and squares of features down to 1e-17 keep their precision.
constexpr float kRowScale = 1.f / 64;
constexpr float kInverseRowScale = 64;

// The third band of a segment of at least this many rows is all pairs minus the other bands, if it has all remaining
// offsets: n / 8.5 is the least eigenvalue of its Laplacian for n = 36 (docs/mathematics.md, section 3).
constexpr int kAllPairs = 36;

// Segments up to this many rows are summed pair by pair.
constexpr int kFewRows = 8;

// After every so many rows of a segment the centre moves.
constexpr int kRecentre = 128;

// Half the number of rows that follow in the bands (1, 3) and (4, 15), by the number of rows that follow in the segment.
struct HalfDegree {
  float near, far;
};
struct HalfDegreesAfter {
  HalfDegree at[2 * kRows];
  constexpr HalfDegreesAfter() : at{} {
    for (int r = 0; r < 2 * kRows; ++r) {
      const int near = r < kNearLast ? r : kNearLast, both = r < kFarLast ? r : kFarLast;
      at[r] = {0.5f * float(near), 0.5f * float(both - near)};
    }
  }
};
__constant__ constexpr HalfDegreesAfter kAfter{};

// What a walk over a segment carries from block to block, with y = (x - centre) * kRowScale.
template <class V>
struct Walk {
  V ring[kRows];      // ring[i]: y of the latest row that is i mod 16
  V far;              // the sum of y over [t - 15, t - 4]
  V third, squares;   // of y and y^2 over the third band's window, [t - last, t - 16]
  V minus_centre;     // times kRowScale
  V near_energy, far_energy, third_energy;  // -1/2 D
  V first, second;    // of x - centre times kSumScale, and of y^2
};

// Where a block is in its segment.
enum class Zone {
  kHead,      // the first of at least 31 rows
  kShortHead, // the first of 16 to 30 rows
  kOnly,      // of at most 15 rows
  kInterior,  // no row before or after the segment is within reach
  kEdge,      // others with 16 rows
  kLast,      // the last, with up to 15 rows
};

__device__ __forceinline__ float least(float a, float b) { return a < b ? a : b; }

// Where the third band's window is, if it is summed: rows t - last to t - 16.
struct Third {
  int leaves;        // the first row of this block behind which the window leaves a row
  float half;        // half the number of rows in the window
  float half_grown;  // of those at the block's first row, if it has not yet reached `half`

  __device__ __forceinline__ Third(int last, int begin)
      : leaves(last + 1 - begin), half(0.5f * float(last - kFarLast)), half_grown(0.5f * float(begin - kFarLast)) {}
  __device__ __forceinline__ float rows_before() const { return 2 * least(half_grown - 0.5f, half); }
};

// Rows [begin, begin + 16) of a segment of n rows, or as many as there are. `leaving`: rows `last` + 1 before, which
// leave the third window.
template <class T, Zone zone, bool with_third, bool sliding = with_third, class V>
__device__ __forceinline__ void walk_block(const Rows<T>& rows, const Rows<T>& leaving, int begin, int n, const Third& third,
                                           Walk<V>& w) {
  constexpr bool first_block = zone == Zone::kHead || zone == Zone::kShortHead || zone == Zone::kOnly;
  constexpr bool last_block = zone == Zone::kOnly || zone == Zone::kLast;
  constexpr bool inside = zone == Zone::kHead || zone == Zone::kInterior;  // all later rows in reach exist
  constexpr int kFarCount = kFarLast - kNearLast;
  // In a register of this thread's: the table's address would else be copied there for every row.
  const int left = opaque(last_block ? n - begin : smaller(n - begin, 2 * kRows - 1));
  const HalfDegree* const after = kAfter.at + (left - 1);
  V(&ring)[kRows] = w.ring;
  V far = w.far, window = w.third, squares = w.squares;
  V near_energy{}, far_energy{}, third_energy{}, first{}, second{}, sum_of_squares{}, near{}, pair{}, now{};
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (last_block && i >= left) break;
    const V before = now;
    now = fused(widen<T>(rows[i]), kRowScale, w.minus_centre);
    // y[t - back], 0 before the segment
    const auto past = [&](int back) { return first_block && back > i ? V{} : ring[(i + kRows - back) % kRows]; };
    if (i % 2 == 0) {
      pair = first_block && i < 2 ? past(1) : past(1) + past(2);
      near = first_block && i < 3 ? pair : pair + past(3);
    } else {
      near = first_block && i < 2 ? before : before + pair;
    }
    if constexpr (!first_block) far = far + (past(4) - past(16));
    else if (i == 4) far = past(4);
    else if (i > 4) far = far + past(4);

    // Taking the difference first keeps the terms of a slowly changing feature small (docs/mathematics.md, section 4).
    constexpr float near_limit = 0.5f * kNearLast, far_limit = 0.5f * kFarCount;
    if constexpr (zone == Zone::kInterior) {
      near_energy = fused(now, fused(now, -2 * near_limit, near), near_energy);
      far_energy = fused(now, far, far_energy);
    } else {
      float near_half = first_block ? 0.5f * float(smaller(i, kNearLast)) : near_limit;
      float far_half = first_block ? 0.5f * float(larger(i - kNearLast, 0)) : far_limit;
      const HalfDegree later = inside ? HalfDegree{near_limit, far_limit} : after[-i];
      near_half += later.near;
      far_half += later.far;
      near_energy = fused(now, fused(now, -near_half, near), near_energy);
      if (first_block && i < 4) far_energy = fused(now * now, -far_half, far_energy);
      else far_energy = fused(now, fused(now, -far_half, far), far_energy);
    }
    second = fused(now, now, second);
    if constexpr (last_block) first = first + now;

    if constexpr (with_third) {
      const V entering = past(16);
      window = window + entering;
      squares = fused(entering, entering, squares);
      if (sliding && (zone == Zone::kInterior || i >= third.leaves)) {
        const V gone = fused(widen<T>(leaving[i]), kRowScale, w.minus_centre);
        window = window - gone;
        squares = fused(V{} - gone, gone, squares);
      }
      if constexpr (zone == Zone::kInterior) {
        third_energy = fused(now, window, third_energy);
      } else {
        const float half = least(third.half_grown + 0.5f * float(i), third.half);
        third_energy = fused(now, fused(now, -half, window), third_energy);
      }
      sum_of_squares = sum_of_squares + squares;
    }
    ring[i] = now;
  }
  if constexpr (!last_block) {
    first = (far + near) + now;  // the windows hold the block's rows
    w.far = far;
    w.third = window;
    w.squares = squares;
  }
  if constexpr (zone == Zone::kInterior) far_energy = fused(second, -float(kFarCount), far_energy);
  if constexpr (with_third) {
    if (zone == Zone::kInterior) third_energy = fused(second, -third.half, third_energy);
    w.third_energy = w.third_energy + fused(sum_of_squares, -0.5f, third_energy);
  }
  w.near_energy = w.near_energy + near_energy;
  w.far_energy = w.far_energy + far_energy;
  w.first = fused(first, kInverseRowScale * kSumScale<float>, w.first);
  w.second = w.second + second;
}

// Moves the centre to the mean of the last 16 rows, before row `begin`, and sums the far window afresh: so neither a slow
// change of the feature's level nor rounding errors accumulate along T. At least 15 rows must follow. `grown`: rows in the third window.
template <class V>
__device__ __forceinline__ void recentre(int begin, float grown, Walk<V>& w) {
  V shift{};
#pragma unroll
  for (int i = 0; i < kRows; ++i) shift = fused(w.ring[i], 1.f / kRows, shift);
  shift = select(equal(shift - shift, V{}), shift, V{});  // as in start_walk
  w.minus_centre = w.minus_centre - shift;
  w.far = V{};
  V near_pairs{}, far_pairs{};
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const V now = w.ring[i] - shift;
    // The energies have y^2 of these rows for each pair with a later row, whose product will be of the new y.
    const int all = i, near = larger(i - (kFarLast - kNearLast), 0);
    const V both = w.ring[i] + now;
    if (near > 0) near_pairs = fused(both, float(near), near_pairs);
    if (all > near) far_pairs = fused(both, float(all - near), far_pairs);
    if (i < kFarLast - kNearLast) w.far = w.far + now;
    w.ring[i] = now;
  }
  w.near_energy = fused(shift * 0.5f, near_pairs, w.near_energy);
  w.far_energy = fused(shift * 0.5f, far_pairs, w.far_energy);
  // sum (y - shift)^2 = sum y^2 - shift (2 sum y - count shift)
  const float count = float(begin);
  const V first = w.first * (kRowScale / kSumScale<float>), minus = V{} - shift;
  w.second = not_a_number_to(w.second, fused(minus, fused(minus, count, first * 2.f), w.second));
  w.first = fused(minus * (kInverseRowScale * kSumScale<float>), count, w.first);
  w.squares = fused(minus, fused(minus, grown, w.third * 2.f), w.squares);
  w.third = fused(minus, grown, w.third);
}

// Begins a segment of n > kFewRows rows whose first block is `rows`. The centre is the mean of the first rows, at least
// an eighth of them up to 128 (docs/mathematics.md, section 4), and of equal values is that value.
template <class T, class V>
__device__ __forceinline__ void start_walk(const Rows<T>& rows, int n, Walk<V>& w) {
  const auto sum_of_four = [&](int i) {
    return (widen<T>(rows[i]) * kRowScale + widen<T>(rows[i + 1]) * kRowScale) +
           (widen<T>(rows[i + 2]) * kRowScale + widen<T>(rows[i + 3]) * kRowScale);
  };
  V sum = sum_of_four(0);
  float share = -1.f / 4;
  if (n > 32) {
    sum = (sum + sum_of_four(4)) + (sum_of_four(8) + sum_of_four(12));
    share = -1.f / 16;
  }
  sum = sum * share;
  w = {};
  // Without a finite centre an infinite feature would be NaN.
  w.minus_centre = select(equal(sum - sum, V{}), sum, V{});
}

// The sums of a sequence's segments, in the same units.
template <class V>
struct Totals {
  V near{}, far{}, third{};  // -1/2 D
  V total{}, square{};       // of x * kSumScale, and of (x * kRowScale)^2
};

// Adds a segment of n rows. `identity`: its third band is all pairs minus the others.
template <class AnyWalk, class V>
__device__ __forceinline__ void add_walk(const AnyWalk& w, int n, bool identity, Totals<V>& totals) {
  const float count = float(n);
  const V first = w.first * (kRowScale / kSumScale<float>);  // of y
  totals.near = totals.near + w.near_energy;
  totals.far = totals.far + w.far_energy;
  if (identity) {
    const V all = fused(w.second, count, (V{} - first) * first);
    totals.third = totals.third + (fused(all, -0.5f, V{} - w.near_energy) - w.far_energy);
  } else {
    totals.third = totals.third + w.third_energy;
  }
  totals.total = totals.total + fused(w.minus_centre * (-kInverseRowScale * kSumScale<float>), count, w.first);
  // sum x^2 = sum y^2 + centre (2 sum y + n centre); if that is inf - inf, sum y^2 is infinite
  const V square = fused(w.minus_centre, fused(w.minus_centre, count, first * -2.f), w.second);
  totals.square = totals.square + not_a_number_to(w.second, square);
}

// Adds a segment of n <= most rows.
template <class T, int most, class V>
__device__ __forceinline__ void add_few_rows(const Rows<T>& rows, int n, Totals<V>& totals) {
  V x[most], near{}, far{}, square{};
#pragma unroll
  for (int i = 0; i < most; ++i) {
    if (i >= n) break;
    x[i] = widen<T>(rows[i]) * kRowScale;
    totals.total = fused(x[i], kInverseRowScale * kSumScale<float>, totals.total);
    square = fused(x[i], x[i], square);
#pragma unroll
    for (int j = 0; j < i; ++j) {
      const V step = x[i] - x[j];
      if (i - j <= kNearLast) near = fused(step, step, near);
      else far = fused(step, step, far);
    }
  }
  totals.near = fused(near, -0.5f, totals.near);
  totals.far = fused(far, -0.5f, totals.far);
  totals.square = totals.square + square;
}

}  // namespace tsae::cuda
