// The backward pass for a tile: the gradient through the activation and the statistics. docs/mathematics.md, section 2.
#pragma once

#include "gelu.h"
#include "tiles.h"

namespace tsae {
namespace TSAE_TARGET {

// State of one tile in the backward pass, kept from block to block.
template <class E>
struct BackwardState {
  using V = Pack<E>;
  V* rows;  // the ring buffer
  Window<V>* windows;
  V centre, accumulated;
  Mask<E> masked;  // features whose coefficients are all 0: no window term, as 0 times an infinite one would be NaN
  bool any;        // any feature is not masked
  int seen;        // rows of the run written to the ring buffer so far
};

template <class E>
TSAE_INLINE void backward_start(const Backward& f, const Tile& tile, BackwardState<E>& at) {
  using V = Pack<E>;
  at.accumulated = V{};
  at.masked = everywhere<E>();
  at.any = false;
  if (!f.grad_differences) return;
  const auto coefficient = [&](int64_t s) {
    return load_numbers<E>(f.grad_differences, tile.b * f.differences_batch + s * f.k + tile.j, tile.count) * E(2);
  };
  for (int64_t s = 0; s < f.S; ++s) at.masked = at.masked & equal(coefficient(s), V{});
  for (int lane = 0; lane < tile.count; ++lane) at.any |= !at.masked.v[lane / V::lanes][lane % V::lanes];
  if (!at.any) return;
  for (int64_t r = 0; r < f.number_of_windows; ++r) {
    const BackwardWindow& window = f.windows[r];
    at.windows[r].reach = window.reach;
    at.windows[r].weight = window.plus < 0 ? V{} : coefficient(window.plus);
    if (window.minus >= 0) at.windows[r].weight = at.windows[r].weight - coefficient(window.minus);
  }
}

// The windows of a block, moved row by row. Their number is a compile-time constant, so their sums stay in registers.
template <class E, int count>
class Sliding {
  using V = Pack<E>;
  const int n;
  RingInTurn<E> now, entering[count], leaving[count];
  OfBlock<E> counts[count];
  Window<V> windows[count];

  template <int w = 0, class F>
  static TSAE_INLINE void each(const F& f) {
    f(w);
    if constexpr (w + 1 < count) each<w + 1>(f);
  }

 public:
  TSAE_INLINE Sliding(const Ring<E>& y, int begin, int end, int n, const Window<V>* from)
      : n(n), now(in_turn(y, begin)) {
    each([&](int w) TSAE_INLINE_LAMBDA {
      windows[w] = from[w];
      entering[w] = in_turn(y, begin + from[w].reach);
      leaving[w] = in_turn(y, begin - from[w].reach - 1);
      const int reach = from[w].reach;
      counts[w] = of_block<E>(begin, end, [=](int t) TSAE_INLINE_LAMBDA { return E(window_count(t, n, reach)); });
    });
  }
  TSAE_INLINE V window_term(int t) {
    const V y_t = now();
    V sum{};
    each([&](int w) TSAE_INLINE_LAMBDA {
      sum = sum + slide_window(y_t, t, n, entering[w], leaving[w], counts[w](t), windows[w]);
      entering[w].next(), leaving[w].next();
    });
    now.next();
    return sum;
  }
  TSAE_INLINE void keep(Window<V>* to) const {
    each([&](int w) TSAE_INLINE_LAMBDA { to[w].sum = windows[w].sum; });
  }
};

template <int count>
struct NumberOfWindows {};

template <class T, Activation activation, class E = compute_of<T>>
TSAE_INLINE void backward_block(const Backward& f, const Run& run, int begin, const Tile& tile, BackwardState<E>& at) {
  using V = Pack<E>;
  const int n = run.end - run.begin, end = smaller(begin + kBlock, n);
  const Ring<E> y(at.rows, f.ring, begin - f.reach - 1);
  const Reader<T> saved(f.saved, tile), grad_h(f.grad_h, tile);
  const Writer<T> grad_pre(f.grad_pre, f.T, f.k, f.stream, tile);
  const int64_t at_feature = tile.b * f.k + tile.j;
  const V bias = f.bias ? load_numbers<E>(f.bias, tile.j, tile.count) : V{};
  const V of_total = f.grad_total ? load_numbers<E>(f.grad_total, at_feature, tile.count) : V{};
  const V of_square = f.grad_square ? load_numbers<E>(f.grad_square, at_feature, tile.count) * E(2) : V{};
  const Mask<E> masked = at.masked;
  Window<V>* const windows = at.windows;
  const bool compare = at.any && !run.excluded && n > 1;
  if (compare) {
    const int until = smaller(end + f.reach, n);
    const V centre = begin == 0 ? V{} : at.centre;
    V sum{};
    for (int t = begin == 0 ? 0 : at.seen; t < until; ++t) {
      V x = saved(run.begin + t);
      if constexpr (activation == kGelu) {
        x = x + bias;
        x = widen<T>(narrow<T>(x * normal(x).distribution));
      }
      const V shrunk = x * kSumScale<E>;
      y[t] = shrunk - centre;
      sum = sum + shrunk;
    }
    at.seen = until;
    if (begin == 0) {  // any centre near the mean will do
      const V near = sum * (1 / E(until));
      for (int t = 0; t < until; ++t) y[t] = y[t] - near;
      at.centre = near;
      for (int64_t w = 0; w < f.number_of_windows; ++w) open_window(y, n, windows[w]);
    }
  }
  const auto write = [&](auto slide) TSAE_INLINE_LAMBDA {
    V accumulated = at.accumulated;
    for (int t = begin; t < end; ++t) {
      V grad = slide(t);
      // h. Prefetching for the next tile a second time gains 6 to 15 % for single tiles, and loses as much for tile
      // groups.
      V x = compare && f.T > kRowsKept ? saved.again(run.begin + t) : saved(run.begin + t);
      [[maybe_unused]] V slope;  // gelu'(z)
      if constexpr (activation == kGelu) {
        const V z = x + bias;
        const Normal<E> at_z = normal(z);
        slope = at_z.distribution + z * at_z.density;
        x = widen<T>(narrow<T>(z * at_z.distribution));
      }
      if (!run.excluded) {
        if (f.grad_total) grad = grad + of_total;
        if (f.grad_square) grad = grad + of_square * x;
      }
      if (f.grad_h.data) grad = grad + grad_h(run.begin + t);
      if constexpr (activation == kRelu) grad = select(less_equal(x, V{}), V{}, grad);
      if constexpr (activation == kGelu) grad = grad * slope;
      grad_pre(run.begin + t, narrow<T>(grad));
      accumulated = accumulated + grad;
    }
    at.accumulated = accumulated;
  };
  if (!compare) return write([](int) { return V{}; });
  const auto gradient = [&](const V& window_term) TSAE_INLINE_LAMBDA {
    return select(masked, V{}, window_term * (1 / kSumScale<E>));
  };
  const auto slide = [&]<int count>(NumberOfWindows<count>) TSAE_INLINE_LAMBDA {
    Sliding<E, count> sliding(y, begin, end, n, windows);
    write([&](int t) TSAE_INLINE_LAMBDA { return gradient(sliding.window_term(t)); });
    sliding.keep(windows);
  };
  if constexpr (TSAE_VECTOR_BYTES == 64) {  // has 32 registers; with 16, none would be left for the windows
    switch (f.number_of_windows) {
      case 1: return slide(NumberOfWindows<1>{});
      case 2: return slide(NumberOfWindows<2>{});
      case 3: return slide(NumberOfWindows<3>{});
    }
  }
  write([&](int t) TSAE_INLINE_LAMBDA {
    V window_term{};
    for (int64_t w = 0; w < f.number_of_windows; ++w)
      window_term = window_term + slide_window(y, y(t), t, n, windows[w]);
    return gradient(window_term);
  });
}

template <class T, Activation activation, class E = compute_of<T>>
void backward_tiles(const Backward& f, Runs runs, int64_t b, int64_t first, int64_t tiles, void* scratch) {
  using V = Pack<E>;
  BackwardState<E> at[kTilesTogether];
  V* rows = static_cast<V*>(scratch);
  for (int64_t i = 0; i < tiles; ++i, rows += f.ring + 3 * f.number_of_windows) {
    at[i].rows = rows;
    at[i].windows = reinterpret_cast<Window<V>*>(rows + f.ring);
    backward_start(f, Tile(f.k, V::width, b, first + i), at[i]);
  }
  const auto block = [&](int64_t i, const Run& run, int begin, const Tile& tile) {
    backward_block<T, activation>(f, run, begin, tile, at[i]);
  };
  block_by_block<V::width>(f.saved, f.T, f.k, runs, b, first, tiles, block);
  for (int64_t i = 0; i < tiles; ++i) {
    const Tile tile(f.k, V::width, b, first + i);
    store_numbers<E>(f.grad_bias, b * f.k + tile.j, at[i].accumulated, tile.count);
  }
}

}  // namespace TSAE_TARGET
}  // namespace tsae
