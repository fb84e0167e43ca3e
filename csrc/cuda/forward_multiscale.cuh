// The forward pass: activation and temporal statistics from one read of pre. docs/mathematics.md, sections 2 to 4.
//
// Here the kernels for the bands (1, 3), (4, 15) and one more; those for any bands are in forward_any.cu. A block is one
// warp. Memory traffic per column (b, j) of bfloat16 [B, 128, k] with three bands: 256 bytes read, 256 written for h and
// 20 for the statistics; the statistics alone read 256 and write 20. Counts of transitions write another 12.
#pragma once

#include "activation.cuh"
#include "grouped_walk.cuh"
#include "transitions.cuh"

namespace tsae::cuda {
namespace {

// What is written beside the statistics.
enum class Result { kNothing, kFeatures, kMask };

// The mask of active features, a bit for each position: [B, ceil(T / 32), k] of 32 bits.
struct ActiveMask {
  uint32_t* at;  // this thread's features, at the next word
  int64_t time;
  bool exists;
  uint32_t a = 0, b = 0;  // the current word of each feature

  __device__ __forceinline__ ActiveMask(const Forward& f, const Place& place)
      : at(static_cast<uint32_t*>(f.active) + place.b * f.words * f.k + place.j), time(f.k),
        exists(place.count > 0) {}
  __device__ __forceinline__ void write() {
    if (exists) *reinterpret_cast<Stored<uint32_t>*>(at) = {a, b};
    at += time;
  }
  // Adds `count` <= 16 bits, of positions from t on.
  __device__ __forceinline__ void add(int t, int count, uint32_t more_a, uint32_t more_b) {
    const int shift = t % 32;
    a |= more_a << shift;
    b |= more_b << shift;
    if (shift + count >= 32) {
      write();
      a = more_a >> (32 - shift);
      b = more_b >> (32 - shift);
    }
  }
  __device__ __forceinline__ void finish(int T_) {
    if (T_ % 32 != 0) write();
  }
};

// What a kernel writes beside the statistics, position by position.
template <class T, Mode mode, Result result, bool counted>
struct Activations {
  Activate<T, mode> activate;
  ActiveMask mask;
  T* to;  // h of this thread's features at the next position
  int k;
  bool exists;

  __device__ __forceinline__ Activations(const Forward& f, const Place& place)
      : activate(f, place), mask(f, place), to(static_cast<T*>(f.h) + place.b * f.T * f.k + place.j), k(opaque(int(f.k))),
        exists(place.count > 0) {}

  // Activates `count` rows from position t on, in place, and writes them. `full`: there are 16. Returns where each
  // feature is on, which with a threshold is where it is not 0, if that is written or counted.
  template <bool full>
  __device__ __forceinline__ Pair<uint32_t> operator()(int t, int count, Rows<T>& rows) {
    if constexpr (kHasThreshold<mode>) {
      if (activate.thresholds) return rows_of<full, true>(t, count, rows);
    }
    return rows_of<full, false>(t, count, rows);
  }

 private:
  template <bool full, bool each>  // each: one threshold for each position
  __device__ __forceinline__ Pair<uint32_t> rows_of(int t, int count, Rows<T>& rows) {
    const float* const thresholds = activate.thresholds + t;
    uint32_t a = 0, b = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (!full && i >= count) break;
      rows[i] = activate(rows[i], each ? splat(__ldg(thresholds + i)) : activate.threshold);
      if constexpr (result == Result::kFeatures) {
        if (exists) *reinterpret_cast<Stored<T>*>(to + int64_t(k) * i) = rows[i];
      }
      if constexpr (result == Result::kMask || counted) {
        const Mask on = kHasThreshold<mode> ? nonzero<T>(rows[i]) : is_on<T>(rows[i]);
        if (on.a) a |= 1u << i;
        if (on.b) b |= 1u << i;
      }
    }
    to += int64_t(k) * count;
    if constexpr (result == Result::kMask) mask.add(t, count, a, b);
    return {a, b};
  }
};

// Where each feature is on in `count` rows. `full`: there are 16.
template <class T, bool full>
__device__ __forceinline__ Pair<uint32_t> on_in(int count, const Rows<T>& rows) {
  uint32_t a = 0, b = 0;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (!full && i >= count) break;
    const Mask on = is_on<T>(rows[i]);
    if (on.a) a |= 1u << i;
    if (on.b) b |= 1u << i;
  }
  return {a, b};
}

// Warps of a multiprocessor; the kernels' register count is limited to allow as many.
template <class T, Mode mode, bool sliding>
constexpr int kWarps = sliding ? (sizeof(T) == 2 ? 8 : 4) : mode == Mode::kGelu ? 8 : 12;

// Whether statistics are summed by groups of rows, for which other types have too many bits (grouped_walk.cuh).
template <class T>
constexpr bool kByGroups = __is_same(T, BFloat16);

// Rows that the third band reaches back to, beyond those in registers. None if its window never leaves a row.
TSAE_INLINE int rows_back(const Forward& f) { return f.S > 2 && f.bands[5] < f.T - 1 ? f.bands[5] + 1 : 0; }

// The sum of this thread's features, if it is not finite although they may be: then at least one is infinite.
template <class T, Mode mode>
__device__ __forceinline__ Pair<float> infinite_total(const Forward& f, const Place& place) {
  if (mode != Mode::kIdentity) return splat(INFINITY);  // no activation gives -inf
  const Column<T> x(f.pre, place);
  const int* ends = f.ends ? f.ends + place.b * f.T : nullptr;
  Pair<float> total{};
  for (int next = 0; next < f.T;) {
    const Run run = run_at(ends, next, f.T);
    next = run.end;
    for (int t = run.begin; t < run.end && !run.excluded; ++t) total = fused(x(t), kSumScale<float>, total);
  }
  return total * kInverseSumScale<float>;
}

template <class T, Mode mode>
__device__ __forceinline__ void write_totals(const Forward& f, const Place& place, const Totals<Pair<float>>& totals) {
  using V = Pair<float>;
  constexpr float scale = kInverseRowScale * kInverseRowScale;
  const V square = totals.square * scale;
  const int64_t at = place.b * f.S * f.k + place.j;
  store_numbers(f.differences, at, finished_energy(totals.near * (-2 * scale), square), true, 2);
  store_numbers(f.differences, at + f.k, finished_energy(totals.far * (-2 * scale), square), true, 2);
  if (f.S > 2)
    store_numbers(f.differences, at + 2 * f.k, finished_energy(totals.third * (-2 * scale), square), true, 2);
  V total = totals.total * kInverseSumScale<float>;
  const Mask known = equal(total, total) | not_equal(square, square);
  if (!(known.a && known.b)) total = select(known, total, infinite_total<T, mode>(f, place));
  write_moments<float>(f, place, total, square);
}

// Takes blocks of rows from the ring, activates them and, if `counted`, counts transitions.
template <class T, Mode mode, Result result, bool sliding, bool counted>
struct Blocks {
  RowRing<T> ring;
  Activations<T, mode, result, counted> activations;
  int back, slot = 0;
  BlockTransitions transitions;

  __device__ __forceinline__ Blocks(const Forward& f, const Place& place)
      : ring(f.pre, place, f.T, f.k, f.ring), activations(f, place), back(sliding ? rows_back(f) : 0) {
    ring.start();
  }
  // `count` rows from position t on, which is where the last block ended. `full`: there are 16.
  template <bool full>
  __device__ __forceinline__ void take(int t, int count, Rows<T>& rows) {
    ring.await(t - back, t + count);
    ring.template load<full>(slot, count, rows);
    [[maybe_unused]] Pair<uint32_t> on{};
    if constexpr (result != Result::kNothing) {
      on = activations.template operator()<full>(t, count, rows);
      if (sliding) ring.store(slot, count, rows);
    } else if constexpr (counted) {
      on = on_in<T, full>(count, rows);
    }
    if constexpr (counted) transitions.template add<full>(on.a, on.b, count);
    slot = ring.after(slot, count);
  }
  // The rows `back` before those that were taken last.
  __device__ __forceinline__ void take_leaving(int count, Rows<T>& rows) const {
    const int from = ring.before(ring.before(slot, count), back);
    ring.template load<false>(from, count, rows);
  }
};

// One run of a sequence, by window sums.
template <class T, Mode mode, Result result, bool sliding, bool counted>
__device__ __forceinline__ void walk_run(const Forward& f, const Run& run,
                                         Blocks<T, mode, result, sliding, counted>& blocks,
                                         Totals<Pair<float>>& totals) {
  Walk<Pair<float>> walk;
  const int n = run.end - run.begin, last = f.bands[5];
  const bool identity = n >= kAllPairs && last >= n - 1, third = f.S > 2 && n > kRows && !identity;
  // Interior blocks that begin in [inner, outer]: the third window, if it is summed, slides there.
  const int inner = third ? last + 1 : kRows, outer = run.excluded || (third && !sliding) ? -1 : n - 2 * kRows + 1;
  for (int begin = 0; begin < n; begin += kRows) {
    Rows<T> rows, leaving;
    const Third window(last, begin);
    if (begin >= inner && begin <= outer) {
      if (begin % kRecentre == 0) recentre(begin, window.rows_before(), walk);
      blocks.template take<true>(run.begin + begin, kRows, rows);
      if (sliding && third) {
        blocks.take_leaving(kRows, leaving);
        walk_block<T, Zone::kInterior, sliding>(rows, leaving, begin, n, window, walk);
      } else {
        walk_block<T, Zone::kInterior, false>(rows, leaving, begin, n, window, walk);
      }
      continue;
    }
    const int count = smaller(n - begin, kRows);
    if (count == kRows && mode != Mode::kGelu) blocks.template take<true>(run.begin + begin, kRows, rows);
    else blocks.template take<false>(run.begin + begin, count, rows);
    if (run.excluded) {
    } else if (n <= kFewRows) {
      add_few_rows<T, kFewRows>(rows, n, totals);
    } else if (begin == 0) {
      start_walk<T>(rows, n, walk);
      if (n >= 2 * kRows - 1) walk_block<T, Zone::kHead, false>(rows, leaving, 0, n, window, walk);
      else if (n >= kRows) walk_block<T, Zone::kShortHead, false>(rows, leaving, 0, n, window, walk);
      else walk_block<T, Zone::kOnly, false>(rows, leaving, 0, n, window, walk);
    } else {
      if (begin % kRecentre == 0 && begin + kFarLast <= n) recentre(begin, window.rows_before(), walk);
      if (third) {
        if (sliding && window.leaves < kRows) blocks.take_leaving(count, leaving);
        if (begin + kRows <= n) walk_block<T, Zone::kEdge, true, sliding>(rows, leaving, begin, n, window, walk);
        else walk_block<T, Zone::kLast, true, sliding>(rows, leaving, begin, n, window, walk);
      } else {
        if (begin + kRows <= n) walk_block<T, Zone::kEdge, false>(rows, leaving, begin, n, window, walk);
        else walk_block<T, Zone::kLast, false>(rows, leaving, begin, n, window, walk);
      }
    }
  }
  if (!run.excluded && n > kFewRows) add_walk(walk, n, identity, totals);
}

// The same by groups of four rows (grouped_walk.cuh).
template <class T, Mode mode, Result result, bool sliding, bool counted>
__device__ __forceinline__ void walk_run_in_groups(const Forward& f, const Run& run,
                                                   Blocks<T, mode, result, sliding, counted>& blocks,
                                                   Totals<Pair<float>>& totals) {
  using enum GroupZone;
  using enum ThirdBand;
  const int n = run.end - run.begin, last = f.bands[5];
  Rows<T> rows, leaving;
  if (run.excluded || n <= kRows) {
#pragma unroll 1
    for (int begin = 0; begin < n; begin += kRows) {
      blocks.template take<false>(run.begin + begin, smaller(n - begin, kRows), rows);
      if (!run.excluded) add_few_rows<T, kRows>(rows, n, totals);
    }
    return;
  }
  GroupWalk<Pair<float>> walk;
  const bool identity = n >= kAllPairs && last >= n - 1, third = f.S > 2 && !identity;
  const int full = sliding && third ? last + 1 : n;  // from here on a row leaves the third window with each row
  blocks.template take<mode != Mode::kGelu>(run.begin, kRows, rows);
  start_groups<T>(rows, walk);
  const Third at_first(last, 0);
  if (n >= 2 * kRows - 1) walk_groups<T, kHead>(rows, leaving, 0, at_first, walk);
  else walk_groups<T, kShortHead>(rows, leaving, n - kRows, at_first, walk);
  for (int begin = kRows; begin < n; begin += kRows) {
    constexpr ThirdBand band = sliding ? kAny : kGrowing;
    const int left = n - begin - kRows;  // rows after this block
    const Third window(last, begin);
    if (begin % kRecentre == 0 && left >= -1) recentre<T>(begin, sliding && third ? window.rows_before() : 0.f, walk);
    if (left >= kFarLast) {
      blocks.template take<true>(run.begin + begin, kRows, rows);
      if (sliding && third && window.leaves < kRows) blocks.take_leaving(kRows, leaving);
      if (sliding && begin >= full) walk_groups<T, kInterior, kFull>(rows, leaving, 0, window, walk);
      else if (sliding && third) walk_groups<T, kInterior, kAny>(rows, leaving, 0, window, walk);
      else walk_groups<T, kInterior>(rows, leaving, 0, window, walk);
      continue;
    }
    const int count = smaller(n - begin, kRows);
    if (left >= 0 && mode != Mode::kGelu) blocks.template take<true>(run.begin + begin, kRows, rows);
    else blocks.template take<false>(run.begin + begin, count, rows);
    if (sliding && third && window.leaves < kRows) blocks.take_leaving(count, leaving);
    if (third) {
      if (left > 0) walk_groups<T, kEdge, band>(rows, leaving, left, window, walk);
      else if (sliding && left == 0) walk_groups<T, kWholeLast, band>(rows, leaving, 0, window, walk);
      else walk_groups<T, kLast, band>(rows, leaving, count, window, walk);
    } else {
      if (left > 0) walk_groups<T, kEdge>(rows, leaving, left, window, walk);
      else if (left == 0) walk_groups<T, kWholeLast>(rows, leaving, 0, window, walk);
      else walk_groups<T, kLast>(rows, leaving, count, window, walk);
    }
  }
  add_walk(walk, n, identity, totals);
}

template <class T, Mode mode, Result result, bool sliding, bool counted>
__global__ void __launch_bounds__(kLanes, kWarps<T, mode, sliding>) forward_multiscale(const __grid_constant__ Forward f) {
  const Place place = place_of(f.k, kTile);
  Blocks<T, mode, result, sliding, counted> blocks(f, place);
  const int* ends = f.ends ? f.ends + place.b * f.T : nullptr;
  int following = ends ? __ldg(ends) : f.T;
  Totals<Pair<float>> totals;
  for (int start = 0; start < f.T;) {
    const Run run{start, following < 0 ? -following : following, following < 0};
    if (ends && run.end < f.T) following = __ldg(ends + run.end);  // of the next run
    start = run.end;
    blocks.activations.activate.start(run);
    if constexpr (counted) blocks.transitions.start(run);
    if constexpr (kByGroups<T>) walk_run_in_groups(f, run, blocks, totals);
    else walk_run(f, run, blocks, totals);
  }
  if (place.count == 0) return;
  if constexpr (result == Result::kMask) blocks.activations.mask.finish(f.T);
  write_totals<T, mode>(f, place, totals);
  if constexpr (counted) blocks.transitions.write(f, place);
}

template <class T, Result result, bool sliding, bool counted>
const char* launch_multiscale(const Forward& f, void* stream) {
  const int64_t blocks = f.B * ((f.k + kTile - 1) / kTile);
  const auto kernel = [&] {
    if constexpr (result == Result::kNothing) {
      return forward_multiscale<T, Mode::kIdentity, result, sliding, counted>;
    } else {
      if constexpr (result == Result::kFeatures) {
        if (f.activation == kIdentity) return forward_multiscale<T, Mode::kIdentity, result, sliding, counted>;
        if (f.activation == kGelu) return forward_multiscale<T, Mode::kGelu, result, sliding, counted>;
      }
      if constexpr (counted) return forward_multiscale<T, Mode::kThreshold, result, sliding, counted>;
      else if (f.release) return forward_multiscale<T, Mode::kSchmitt, result, sliding, counted>;
      else return forward_multiscale<T, Mode::kRelu, result, sliding, counted>;
    }
  }();
  return launch(kernel, blocks, kLanes, ring_bytes<T>(f.ring), stream, f);
}
template <class T, Result result, bool counted>
const char* launch_multiscale(const Forward& f, void* stream) {
  return rows_back(f) > 0 ? launch_multiscale<T, result, true, counted>(f, stream)
                          : launch_multiscale<T, result, false, counted>(f, stream);
}

// The tuned kernel for `given`.
template <bool counted>
const char* launch_multiscale(const Forward& given, void* stream) {
  Forward f = given;
  f.ring = ring_rows(rows_back(f));
  return with_dtype(f.dtype, [&](auto element) -> const char* {
    using T = decltype(element);
    if constexpr (sizeof(T) == 8) return "no tuned kernel for float64";
    else if (f.active) return launch_multiscale<T, Result::kMask, counted>(f, stream);
    else if (f.h) return launch_multiscale<T, Result::kFeatures, counted>(f, stream);
    else return launch_multiscale<T, Result::kNothing, counted>(f, stream);
  });
}

}  // namespace
}  // namespace tsae::cuda
