// The tuned backward kernel: bands (1, 3), (4, 15) and optionally one from 16 on, any T, 16 or 32 bits.
//
// A block is one warp. Memory traffic per column (b, j) of bfloat16 [B, 128, k]: 512 bytes read, 256 written, and 12 to
// 24 for coefficients and grad_bias.
#pragma once

#include "backward_multiscale.h"
#include "window_walk.cuh"

namespace tsae::cuda {
namespace {

// One warp's features in the tuned kernel.
template <class T, Activation activation>
struct Tile {
  using E = compute_of<T>;
  using V = Pair<E>;

  const Backward& f;
  Place place;
  Rings<T> rings;
  V accumulated{};
  int activated = 0;  // for gelu: batches in the ring that hold h, not pre
  V minus_weights[3];  // of the windows, times kSumScale
  bool any;            // of the warp's features has window terms
  char* to;            // where grad_pre at the next row goes

  __device__ __forceinline__ explicit Tile(const Backward& f) : f(f), place(place_of(f.k, kTile)), rings(f, place) {
    to = static_cast<char*>(f.grad_pre) + (place.b * f.T * f.k + place.j) * int64_t(sizeof(T));
    V gradients[3];
#pragma unroll
    for (int s = 0; s < 3; ++s) {
      const int64_t at = place.b * f.differences_batch + s * f.k + place.j;
      gradients[s] = f.grad_differences && s < f.S ? load_numbers<E>(f.grad_differences, at, place.count) : V{};
    }
    const Mask none = equal(gradients[0], V{}) & equal(gradients[1], V{}) & equal(gradients[2], V{});
    any = of_warp(__syncthreads_or(!(none.a && none.b)));
#pragma unroll
    for (int s = 0; s < 3; ++s) {
      minus_weights[s] = ((s < 2 ? gradients[s + 1] : V{}) - gradients[s]) * (2 * kSumScale<E>);
    }
  }

  __device__ __forceinline__ void step(int t) {
    rings.step(t, place);
    activate_arrived();
  }
  // The windows need h.
  __device__ __forceinline__ void activate_arrived() {
    if constexpr (activation == kGelu) {
      const V bias = f.bias ? load_numbers<E>(f.bias, place.j, place.count) : V{};
      for (; any && activated < rings.ready; ++activated) {
        Stored<T>* const column = rings.h.row(activated * kBatch);
        gelu_in_place<T>(column, kBatch, bias);
        if (column != rings.h.lane) continue;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) column[(kRingRows + i) * kLanes] = column[i * kLanes];
      }
    }
  }

  // What is subtracted from a run's features: their mean, or that of the first `rows` rows, rounded to T.
  __device__ __forceinline__ Level<V> level_of(const Run& run, int rows) {
    Level<V> level;
    const E share = fast_reciprocal(E(rows));
    if (sizeof(T) == 2 && f.total && !f.ends && rows == f.T) {
      const V total = load_numbers<E>(f.total, place.b * f.k + place.j, place.count);
      level.value = widen<T>(narrow<T>(total * share));
      level.sum = fused(level.value, -E(rows), total);
      V far{};
#pragma unroll
      for (int t = 0; t < kFar; ++t) far = far + widen<T>(*rings.h.row(run.begin + t));
      level.of_far = fused(level.value, -E(kFar), far);
      return level;
    }
    int arrived = run.begin + kBatch + kFar;
    if (arrived < run.begin + rows) {
      arrived = rings.fill_from(run.begin, run.begin + rows, place);
      activate_arrived();
    }
    arrived = smaller(rows, arrived - run.begin);
    // Sums of 16-bit features of a common size are exact; those of float need differences.
    const V origin = sizeof(T) == 2 ? V{} : widen<T>(*rings.h.row(run.begin));
    V sum{}, far{};
    int t = 0;
#pragma unroll 1
    for (; t < arrived; t += kBatch) {
      const Stored<T>* const h = rings.h.row(run.begin + t);
      V part{};
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (i >= arrived - t) break;
        if (i == kFar % kBatch && t == kFar - kFar % kBatch) far = sum + part;
        part = part + (widen<T>(h[i * kLanes]) - origin);
      }
      sum = sum + part;
    }
    t = arrived;
    const Column<T> saved = Column<T>(f.saved, place).from(run.begin);
    if (activation != kGelu && saved.paired) {
#pragma unroll 1
      for (; t + kBatch <= rows; t += kBatch) {
        V part{};
#pragma unroll
        for (int i = 0; i < kBatch; ++i) part = part + (widen<T>(saved.pair(t + i)) - origin);
        sum = sum + part;
      }
    }
    const V bias = f.bias ? load_numbers<E>(f.bias, place.j, place.count) : V{};
    const Values<T> values{saved, activation == kGelu, bias};
#pragma unroll 1
    while (t < rows) {
      V part{};
#pragma unroll 1
      for (const int end = smaller(t + kBlock, rows); t < end; ++t) part = part + (values(t) - origin);
      sum = sum + part;
    }
    level.value = widen<T>(narrow<T>(origin + sum * share));
    level.sum = fused(level.value - origin, -E(rows), sum);
    const bool short_run = run.end - run.begin <= kShortRun;
    level.of_far = short_run ? level.sum : fused(level.value - origin, -E(kFar), far);
    return level;
  }

  // Returns the sum of the gradients. plain: without window terms; rows_of_level: those whose mean is subtracted.
  template <bool kSlides>
  __device__ __forceinline__ V walk(const Run& run, bool plain, int rows_of_level) {
    using enum Part;
    WindowWalk<T, activation, kSlides> walk(f, place, rings, run, minus_weights, to);
    const int n = run.end - run.begin;
    const bool short_run = n <= kShortRun, long_run = n >= 4 * kBatch;
    const int end = long_run ? n - 2 * kBatch : n;  // of the rows between the first and the last 16
    const int last_interior = long_run && !plain ? end - kBatch : 0;
#pragma unroll 1
    for (int t = 0; t < n;) {
      step(run.begin + t);
      int count = kBatch;
      if (t >= 2 * kBatch && t <= last_interior) {
        for (;; step(run.begin + t)) {
          walk.template rows<kInterior, false, true>(t, kBatch);
          t += kBatch;
          if (t > last_interior) break;
        }
        continue;
      }
      if (!kSlides && plain) {
        walk.plain_rows(t);
      } else if (t < kBatch) {
        walk.open(level_of(run, rows_of_level));
        if (short_run) walk.template rows<kFirst, true, false>(t, smaller(n, kBatch));
        else if (long_run) walk.template rows<kFirst, false, true>(t, kBatch);
        else walk.template rows<kFirst, true, true>(t, kBatch);
      } else if (t < 2 * kBatch) {
        if (short_run) walk.template rows<kSecond, true, false>(t, n - kBatch);
        else if (long_run) walk.template rows<kSecond, false, true>(t, kBatch);
        else walk.template rows<kSecond, true, true>(t, kBatch);
      } else if (t < end) {
        count = smaller(kBatch, end - t);
        walk.template rows<kInterior, true, true>(t, count);
      } else if (t == end) {
        if (n % kBatch) walk.realign(t);
        walk.template rows<kBeforeLast, false, true>(t, kBatch);
      } else {
        walk.template rows<kLast, false, true>(t, kBatch);
      }
      t += count;
    }
    to = walk.next_row();
    return walk.accumulated();
  }

  // For features, sums or gradients that are not finite: sums that do not overflow before their result does, and no
  // window term where a feature has no coefficients.
  __device__ __forceinline__ V again(const Run& run) {
    const Column<T> saved(f.saved, place), grad_h(f.grad_h, place);
    const Columns<T> columns{saved, saved, grad_h, Output<T>(f.grad_pre, f.T, f.k, f.paired, place), false};
    Gradient<T> gradient(f, place);
    Window<V> windows[3];
    load_windows(gradient, place, windows);
    any_run(run, columns, true, gradient, windows);
    return gradient.accumulated;
  }
};

// Resident blocks that the registers must allow: as many as the rings, or fewer where the kernel needs more registers.
template <class T, Activation activation, bool kMaySlide>
constexpr int kResidentBackward = kMaySlide || activation == kGelu ? kResidentRings<T> * 3 / 4 : kResidentRings<T>;

// kMaySlide: the third window may be shorter than a run.
template <class T, Activation activation, bool kMaySlide>
__global__ void __launch_bounds__(kLanes, kResidentBackward<T, activation, kMaySlide>)
    backward_multiscale_kernel(const __grid_constant__ Backward f) {
  using V = Pair<compute_of<T>>;
  Tile<T, activation> tile(f);
  const int* ends = f.ends ? f.ends + tile.place.b * f.T : nullptr;
  const int reach = f.S > 2 ? f.bands[5] : f.T;
#pragma unroll 1
  for (int next = 0; next < f.T;) {
    Run run = run_at(ends, next, f.T);
    run = {next, of_warp(run.end), bool(of_warp(run.excluded))};
    next = run.end;
    const int n = run.end - run.begin;
    const bool plain = !tile.any || run.excluded || n == 1;
    V accumulated;
    if (kMaySlide && !plain && reach < n - 1) {
      accumulated = tile.template walk<true>(run, plain, reach);
    } else {
      accumulated = tile.template walk<false>(run, plain, f.S > 2 ? n : smaller(n, kShortRun));
    }
    const Mask finite = equal(accumulated - accumulated, V{});
    if (!plain && !(finite.a && finite.b)) accumulated = tile.again(run);
    tile.accumulated = tile.accumulated + accumulated;
  }
  if (tile.place.count) {
    store_numbers(f.grad_bias, tile.place.b * f.k + tile.place.j, tile.accumulated, f.paired, tile.place.count);
  }
  await_copies();
}

template <class T, Activation activation>
const char* launch_multiscale(const Backward& f, int64_t blocks, void* stream) {
  auto kernel = backward_multiscale_kernel<T, activation, false>;
  if constexpr (activation != kGelu) {
    if (may_slide(f)) kernel = backward_multiscale_kernel<T, activation, true>;
  }
  return launch(kernel, blocks, kLanes, Rings<T>::kBytes, stream, f);
}

template <class T>
const char* launch_multiscale(const Backward& f, int64_t blocks, void* stream) {
  return f.activation == kIdentity ? launch_multiscale<T, kIdentity>(f, blocks, stream)
         : f.activation == kGelu   ? launch_multiscale<T, kGelu>(f, blocks, stream)
                                   : launch_multiscale<T, kRelu>(f, blocks, stream);
}

}  // namespace
}  // namespace tsae::cuda
