// The forward pass for a tile: activation (with the Schmitt trigger) and temporal statistics. docs/mathematics.md,
// sections 2 to 4 and 7.
#pragma once

#include "../shared/schmitt_trigger.h"
#include "gelu.h"
#include "tiles.h"

namespace tsae {
namespace TSAE_TARGET {

enum class Mode { kIdentity, kRelu, kSchmitt, kGelu };

// Where a feature is on. NaN compares false, so it is.
template <class E>
TSAE_INLINE Mask<E> is_on(const Pack<E>& h) {
  return ~less_equal(h, Pack<E>{});
}

// Sums over the positions of a block, or of all: where a feature is on, and where it is on and was at the position
// before.
template <class E>
struct OnCounts {
  Counts<E> on, still;
};

// The activation of one tile.
template <class T, Mode mode, bool counted, class E = compute_of<T>>
struct Activate {
  using V = Pack<E>;
  const Forward& f;
  const Reader<T> pre;
  const Writer<T> h;
  const V bias, release;
  V threshold;
  const E* thresholds;  // per position

  TSAE_INLINE Activate(const Forward& f, const Tile& tile)
      : f(f), pre(f.pre, tile), h(f.h, f.T, f.k, f.stream, tile),
        bias(f.bias ? load_numbers<E>(f.bias, tile.j, tile.count) : splat(-E(0))),  // adding -0 changes nothing
        release(mode == Mode::kSchmitt ? load_numbers<E>(f.release, tile.j, tile.count) : V{}),
        threshold(f.threshold && !f.threshold_per_position ? load_numbers<E>(f.threshold, tile.j, tile.count) : V{}),
        thresholds(f.threshold_per_position ? static_cast<const E*>(f.threshold) + tile.b * f.T : nullptr) {}

  // Computes and writes h at positions [begin, end) of a run. Puts h - centre into the ring buffer y, and adds h *
  // kSumScale to total and h^2 to square. `state`: where the Schmitt trigger is off. If `counted`, adds to `counts`;
  // `last_on`: where h is on at the last position.
  TSAE_INLINE void operator()(const Run& run, int begin, int end, const V& centre, const Ring<E>& y, Mask<E>& state,
                              V& total, V& square, Mask<E>& last_on, OnCounts<E>& counts) {
    Mask<E> off = state, before{};
    OnCounts<E> part{};
    if constexpr (counted) before = last_on;
    for (int t = begin; t < end; ++t) {
      V z = pre(run.begin + t) + bias;
      if constexpr (mode == Mode::kRelu || mode == Mode::kSchmitt) {
        if (thresholds) threshold = splat(thresholds[run.begin + t]);
        if constexpr (mode == Mode::kSchmitt) {
          off = stays_off(z, threshold, release, run.excluded ? everywhere<E>() : off);
        } else {
          off = less_equal(z, threshold);
        }
        z = select(off, V{}, z);
      } else if constexpr (mode == Mode::kGelu) {
        z = z * normal(z).distribution;
      }
      const Stored<T> stored = narrow<T>(z);
      if (f.h) h(run.begin + t, stored);
      const V value = widen<T>(stored);
      y[t] = value - centre;
      total = total + value * kSumScale<E>;
      square = square + value * value;
      if constexpr (counted) {
        const Mask<E> on = is_on(value);
        part.on = counted_in(part.on, on);
        part.still = counted_in(part.still, on & before);
        before = on;
      }
    }
    if constexpr (mode == Mode::kSchmitt) state = off;
    if constexpr (counted) {
      last_on = before;
      counts = part;
    }
  }
};

// State of one tile in the forward pass, kept from block to block.
template <class E>
struct ForwardState {
  using V = Pack<E>;
  V* rows;     // the ring buffer
  V* energy;   // D of each band
  V* past;     // of each band, see band_block
  V centre, total, square;
  Mask<E> off;  // where the Schmitt trigger is off
  // If transitions are counted: where h is on at the last position, and the pairs that are on at both ends, at their
  // first and at their second.
  Mask<E> on;
  Counts<E> both, first, second;
};

template <class E>
TSAE_INLINE void forward_start(const Forward& f, ForwardState<E>& at) {
  at.total = at.square = {};
  at.both = at.first = at.second = {};
  for (int64_t s = 0; s < f.S; ++s) at.energy[s] = {};
}

// Adds the pairs of a block. Every position but a run's last is the first of a pair, and every one but its first is the
// second. `starts`: where the run's first position is on, if it is in this block.
template <class E>
TSAE_INLINE void count_pairs(const OnCounts<E>& block, const Mask<E>& starts, bool last, ForwardState<E>& at) {
  at.both = at.both + block.still;
  at.first = at.first + block.on;
  at.second = uncounted_in(at.second + block.on, starts);
  if (last) at.first = uncounted_in(at.first, at.on);
}

template <class T, Mode mode, bool counted, class E = compute_of<T>>
TSAE_INLINE void forward_block(const Forward& f, const Run& run, int begin, const Tile& tile, ForwardState<E>& at) {
  using V = Pack<E>;
  const int n = run.end - run.begin, end = smaller(begin + kBlock, n);
  if (begin == 0) {
    at.centre = V{};
    at.off = everywhere<E>();
    if constexpr (counted) at.on = Mask<E>{};
    for (int64_t s = 0; s < f.S; ++s) at.past[s] = V{};
  }
  const Ring<E> y(at.rows, f.ring, begin - (f.S > 0 ? f.bands[2 * f.S - 1] : 0) - 1);
  V part{}, part_square{};
  OnCounts<E> counts;
  Activate<T, mode, counted>(f, tile)(run, begin, end, at.centre, y, at.off, part, part_square, at.on, counts);
  if (run.excluded) return;
  // In the first block the centre is still 0, so y is h.
  if constexpr (counted) count_pairs(counts, begin == 0 ? is_on(y(0)) : Mask<E>{}, end == n, at);
  at.total = at.total + part;
  at.square = at.square + part_square;
  if (f.S == 0 || f.bands[0] >= n) return;
  if (begin == 0) {  // any centre near the mean will do; the first block's mean needs no second pass
    at.centre = part * (1 / (E(end) * kSumScale<E>));
    for (int t = 0; t < end; ++t) y[t] = y[t] - at.centre;
  }
  for (int64_t s = 0; s < f.S && f.bands[2 * s] < n; ++s)
    at.energy[s] = at.energy[s] + band_block(y, begin, end, n, f.bands[2 * s], f.bands[2 * s + 1], at.past[s]);
}

template <bool counted, class E>
TSAE_INLINE void forward_finish(const Forward& f, const Tile& tile, const ForwardState<E>& at) {
  using V = Pack<E>;
  // Rounding can make a sum of squares negative, and overflowing squares can give inf - inf = NaN. Unless a feature is
  // NaN (then square is too), the true value is then infinite.
  const V infinity = splat(E(__builtin_inf()));
  const Mask<E> no_nan = equal(at.square, at.square);
  for (int64_t s = 0; s < f.S; ++s) {
    V D = at.energy[s];
    D = select(equal(D, D), select(less_equal(D, V{}), V{}, D), select(no_nan, infinity, D));
    store_numbers<E>(f.differences, (tile.b * f.S + s) * f.k + tile.j, D, tile.count);
  }
  store_numbers<E>(f.total, tile.b * f.k + tile.j, at.total * (1 / kSumScale<E>), tile.count);
  store_numbers<E>(f.square, tile.b * f.k + tile.j, at.square, tile.count);
  if constexpr (counted) {
    const int64_t to = tile.b * 3 * f.k + tile.j;
    store_counts<E>(f.transitions, to, at.both, tile.count);
    store_counts<E>(f.transitions, to + f.k, at.first - at.both, tile.count);
    store_counts<E>(f.transitions, to + 2 * f.k, at.second - at.both, tile.count);
  }
}

template <class T, Mode mode, bool counted, class E = compute_of<T>>
void forward_tiles(const Forward& f, Runs runs, int64_t b, int64_t first, int64_t tiles, void* scratch) {
  using V = Pack<E>;
  ForwardState<E> at[kTilesTogether];
  V* rows = static_cast<V*>(scratch);
  for (int64_t i = 0; i < tiles; ++i, rows += f.ring + 2 * f.S) {
    at[i].rows = rows;
    at[i].energy = rows + f.ring;
    at[i].past = at[i].energy + f.S;
    forward_start(f, at[i]);
  }
  const auto block = [&](int64_t i, const Run& run, int begin, const Tile& tile) {
    forward_block<T, mode, counted>(f, run, begin, tile, at[i]);
  };
  block_by_block<V::width>(f.pre, f.T, f.k, runs, b, first, tiles, block);
  for (int64_t i = 0; i < tiles; ++i) forward_finish<counted>(f, Tile(f.k, V::width, b, first + i), at[i]);
}

template <class T, bool counted>
void forward_tiles(const Forward& f, Runs runs, int64_t b, int64_t first, int64_t tiles, void* scratch) {
  switch (f.activation) {
    case kIdentity: return forward_tiles<T, Mode::kIdentity, counted>(f, runs, b, first, tiles, scratch);
    case kGelu: return forward_tiles<T, Mode::kGelu, counted>(f, runs, b, first, tiles, scratch);
    case kRelu:
      return f.release ? forward_tiles<T, Mode::kSchmitt, counted>(f, runs, b, first, tiles, scratch)
                       : forward_tiles<T, Mode::kRelu, counted>(f, runs, b, first, tiles, scratch);
  }
}

}  // namespace TSAE_TARGET
}  // namespace tsae
