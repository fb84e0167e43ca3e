// The statistics of bfloat16 features over one segment by groups of four rows, with half as many operations per row as
// window sums take (multiscale.cuh). docs/mathematics.md, sections 2 to 4.
//
// The products of rows are taken with sums of groups. Let p be the sum of a row and those before it in its group, S a
// group's sum. With i, j the places of two rows in groups that are d apart, their distance is 4 d + i - j. So the rows at
// distances 1 to 3 before a group's rows are those of the group itself and, of the group before it, those with j > i;
// those at distances 4 to 15 are the rows with j <= i there, the next two groups, and the rows with j > i of the fourth:
//
//     near = sum S (S / 2 + S_1) - sum y p_1 - sum y^2 / 2
//     far  = sum S (S_2 + S_3 + S_4) + sum y p_1 - sum y p_4
//
// where p_d is at the same place of the d-th group before. From these, multiples of sum y^2 are subtracted at the end of
// each block of 16 rows. That is less well conditioned than to take the difference before the product. But a bfloat16 has
// 8 bits: its difference from a centre with few bits, the products and their sums over a block are exact in float32, or
// nearly so. In float16, with 11 bits, a straight line of 128 positions had an error of 8e-5 instead of 2e-6.
#pragma once

#include "multiscale.cuh"

namespace tsae::cuda {

// What a walk over a segment carries from block to block, with y = (x - centre) * kRowScale.
template <class V>
struct GroupWalk {
  V sums[kRows];      // of the latest row that is i mod 16 and those before it in its group
  V middle, early;    // of the second and third group of the last block, and of its first three
  V third, squares;   // of y and y^2 over the third band's window, if it is summed
  V minus_centre;     // times kRowScale
  V near_energy, far_energy, third_energy;  // -1/2 D
  V first, second;    // of x - centre times kSumScale, and of y^2
};

// Where a block is in its segment.
enum class GroupZone {
  kHead,       // the first of at least 31 rows
  kShortHead,  // the first of 17 to 30 rows
  kInterior,   // at least 15 rows follow
  kEdge,       // 1 to 14 rows follow
  kWholeLast,  // the last, with 16 rows
  kLast,       // the last
};

// The third band in a block: not summed, the window holds all rows up to t - 16, some row of this block may be the first
// that one leaves, or one leaves for each row.
enum class ThirdBand { kNone, kGrowing, kAny, kFull };

// The next 16 rows of a segment, or as many as there are. left: in the zone kLast the rows of this block, in
// kShortHead and kEdge the rows after it.
template <class T, GroupZone zone, ThirdBand band = ThirdBand::kNone, class V>
__device__ __forceinline__ void walk_groups(const Rows<T>& rows, const Rows<T>& leaving, int left, const Third& third,
                                            GroupWalk<V>& w) {
  constexpr bool with_third = band != ThirdBand::kNone;
  constexpr bool head = zone == GroupZone::kHead || zone == GroupZone::kShortHead;
  constexpr bool edge = zone == GroupZone::kShortHead || zone == GroupZone::kEdge;
  constexpr bool partial = zone == GroupZone::kLast;
  constexpr bool last = partial || zone == GroupZone::kWholeLast;
  constexpr float near_limit = kNearLast, far_limit = kFarLast - kNearLast;  // half the rows in reach
  V(&sums)[kRows] = w.sums;
  V near{}, far{}, cross{}, squares{}, first{}, sum{};
  V cumulative{};  // the sum of `squares` after each row but the last
  V late{};        // of those from row `left` on
  V missing{};     // y^2, times the rows that the near window lacks
  V before = head ? V{} : sums[15], others = head ? V{} : w.early, pair = w.middle;  // S_1 and S_2 + S_3 + S_4
  V latest[3]{};   // y of the last three rows
  if constexpr (partial) {  // a segment's last three rows may begin in the block before
    const V one = sums[15] - sums[14], two = sums[14] - sums[13];
    missing = fused(two * two, float(larger(2 - left, 0)), one * one * float(larger(3 - left, 0)));
  }
  V window = w.third, window_squares = w.squares, third_energy{}, sum_of_squares{}, older{};
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int i = r % 4;
    if (partial && i == 0 && r >= left) break;
    V now = fused(widen<T>(rows[r]), kRowScale, w.minus_centre);
    if (partial && i > 0 && r >= left) now = V{};
    if constexpr (head || last) {
      if (r > 0) cumulative = r == 1 ? squares : cumulative + squares;
      if (head && r == 3) missing = cumulative;
    }
    if (edge && r > 0 && r > left) late = late + squares;
    if (partial && r > 0 && r > left - 4) late = late + squares;
    squares = r == 0 ? now * now : fused(now, now, squares);
    if (!head || r >= 4) {
      const V& previous = sums[(r + kRows - 4) % kRows];
      cross = r == (head ? 4 : 0) ? now * previous : fused(now, previous, cross);
    }
    const V old = sums[r];
    if constexpr (!head) far = fused(-now, old, far);
    if constexpr (with_third) {
      const V entering = i == 0 ? old : old - older;
      older = old;
      window = window + entering;
      window_squares = fused(entering, entering, window_squares);
      if (band == ThirdBand::kFull || (band == ThirdBand::kAny && r >= third.leaves)) {
        const V gone = fused(widen<T>(leaving[r]), kRowScale, w.minus_centre);
        window = window - gone;
        window_squares = fused(-gone, gone, window_squares);
      }
      if constexpr (band == ThirdBand::kFull) {
        third_energy = fused(now, window, third_energy);
      } else {
        const float half = least(third.half_grown + 0.5f * float(r), third.half);
        third_energy = fused(now, fused(now, -half, window), third_energy);
      }
      if (!partial || r < left) sum_of_squares = sum_of_squares + window_squares;
    }
    if constexpr (last && !partial) latest[2] = latest[1], latest[1] = latest[0], latest[0] = now;
    sum = i == 0 ? now : sum + now;
    sums[r] = sum;
    if (i == 3) {
      near = fused(sum, fused(sum, 0.5f, before), near);
      if (!head || r > 8) far = fused(sum, others, far);
      if (r == 3 && !head) others = pair + before;
      if (r == 3) pair = head ? sum : before + sum;
      if (r == 7) others = head ? pair : sums[11] + pair, pair = pair + sum;
      if (r == 11) others = pair;
      if constexpr (partial) first = first + sum;
      before = sum;
    }
  }
  if constexpr (!partial) {
    w.middle = sums[7] + sums[11];
    w.early = sums[3] + w.middle;
    first = w.early + sums[15];
    w.third = window;
    w.squares = window_squares;
  }
  w.near_energy = w.near_energy + (fused(squares, -(near_limit + 0.5f), near) - cross);
  w.far_energy = w.far_energy + (fused(squares, -far_limit, far) + cross);
  if constexpr (band == ThirdBand::kFull) third_energy = fused(squares, -third.half, third_energy);
  if constexpr (with_third) w.third_energy = w.third_energy + fused(sum_of_squares, -0.5f, third_energy);
  w.first = fused(first, kInverseRowScale * kSumScale<float>, w.first);
  w.second = w.second + squares;

  // At the ends of the segment rows are missing within reach: 15, 14, ... before and after the first and last rows.
  V all{};
  if constexpr (head) all = cumulative;
  if constexpr (edge) all = all + fused(squares, float(kFarLast - left), -late);
  if constexpr (partial) {
    const float beyond = float((left + 3) / 4 * 4 - left);  // rows of the last group that do not exist
    all = fused(squares, kFarLast + beyond, -cumulative);
    missing = missing + fused(squares, kNearLast + beyond, -late);
  } else if constexpr (last) {
    all = fused(squares, float(kFarLast), -cumulative);
    missing = fused(latest[0] * 3.f, latest[0], fused(latest[1] * 2.f, latest[1], latest[2] * latest[2]));
  }
  if constexpr (head || last) w.near_energy = fused(missing, 0.5f, w.near_energy);
  if constexpr (head || last || edge) w.far_energy = fused(head || last ? all - missing : all, 0.5f, w.far_energy);
}

// -kRowScale times a centre near `mean`: of numbers that vary by about `spread` a multiple of that, so that differences
// from it have few more bits than the features, of equal numbers the mean. 0 if it would not be finite: an infinite
// feature would be NaN. Both arguments are scaled by kRowScale.
template <class V>
__device__ __forceinline__ V minus_rounded(const V& mean, const V& spread) {
  constexpr float kGrid = float(1 << 27);  // a float's spacing is at least 2^-24 of it
  const V coarse = spread * kGrid;
  const V centre = (mean + coarse) - coarse;
  return select(equal(centre - centre, V{}), -centre, V{});
}

// A sixteenth of how much the sums of four groups of rows differ.
template <class V>
__device__ __forceinline__ V spread_of(const V& a, const V& b, const V& c, const V& d) {
  const auto distance = [](const V& x, const V& y) { return V{fabsf(x.a - y.a), fabsf(x.b - y.b)}; };
  return (distance(a, b) + distance(c, d) + distance(a, d)) * (1.f / kRows);
}

// The mean of the last 16 rows becomes the centre, before row `begin`; at least 15 rows must follow. So a change of the
// feature's level leaves no large numbers behind. grown: rows in the third window.
template <class T, class V>
__device__ __forceinline__ void recentre(int begin, float grown, GroupWalk<V>& w) {
  V(&sums)[kRows] = w.sums;
  const V mean = fused(w.early + sums[15], 1.f / kRows, -w.minus_centre);
  V shift = w.minus_centre - minus_rounded(mean, spread_of(sums[3], sums[7], sums[11], sums[15]));
  shift = select(equal(shift - shift, V{}), shift, V{});
  w.minus_centre = w.minus_centre - shift;
  // The energies have y^2 of these rows for each pair with a later row, whose product will be of the new y. The sum of
  // y^2 - (y - shift)^2 is shift (2 sum y - count shift). Row i has i later rows in reach, the last three 1, 2, 3 near ones.
  V all{}, near{};
#pragma unroll
  for (int g = 0; g < kRows; g += 4) {
    near = (sums[g] + sums[g + 1]) + sums[g + 2];
    all = all + fused(sums[g + 3], float(g + 3), -near);
  }
  near = fused(sums[15], 3.f, -near);
  const V far = fused(shift, -0.5f * float(kFarLast * (kFarLast + 1) / 2 - 6), all - near);
  w.near_energy = fused(shift, fused(shift, -3.f, near), w.near_energy);
  w.far_energy = fused(shift, far, w.far_energy);
  const float count = float(begin);
  const V first = w.first * (kRowScale / kSumScale<float>), minus = -shift;
  w.second = not_a_number_to(w.second, fused(minus, fused(minus, count, first * 2.f), w.second));
  w.first = fused(minus * (kInverseRowScale * kSumScale<float>), count, w.first);
#pragma unroll
  for (int i = 0; i < kRows; ++i) sums[i] = fused(minus, float(i % 4 + 1), sums[i]);
  w.squares = fused(minus, fused(minus, grown, w.third * 2.f), w.squares);
  w.third = fused(minus, grown, w.third);
  w.middle = fused(minus, 8.f, w.middle);
  w.early = fused(minus, 12.f, w.early);
}

// Begins a segment of more than 16 rows whose first block is `rows`. The centre is near the mean of the first rows, at
// least an eighth of them up to 128 (docs/mathematics.md, section 4).
template <class T, class V>
__device__ __forceinline__ void start_groups(const Rows<T>& rows, GroupWalk<V>& w) {
  w = {};
  const auto scaled = [&](int i) { return widen<T>(rows[i]) * kRowScale; };
  const auto sum_of_four = [&](int i) { return (scaled(i) + scaled(i + 1)) + (scaled(i + 2) + scaled(i + 3)); };
  const V a = sum_of_four(0), b = sum_of_four(4), c = sum_of_four(8), d = sum_of_four(12);
  w.minus_centre = minus_rounded(((a + b) + (c + d)) * (1.f / kRows), spread_of(a, b, c, d));
}

}  // namespace tsae::cuda
