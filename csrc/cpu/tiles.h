// The kernels for one tile: one pack of features of one sequence, walked along T. Included once per instruction set.
//
// A tile's row is a cache line or a few, so a walk along T reads the features once from memory. It goes block by block:
// what the windows need of the rows before and ahead lies in a ring in `scratch`, in the first- or second-level cache
// however long the sequence is.
#pragma once

#include "../normal.h"
#include "kernels.h"
#include "pack.h"
#include "ring.h"
#include "sparse.h"

namespace tsae {
namespace TSAE_TARGET {

// Centred float features are scaled by 2^-16 where they are only summed, so that no sum overflows before the result
// does, even for bfloat16 of 3e38. Exact, as it is a power of two.
template <class E>
constexpr E kShrink = E(1) / 65536;

struct Tile {  // `count` features of sequence b from j on
  int64_t b, j;
  int count;
  int64_t ahead;  // elements from what is read to what is fetched

  TSAE_INLINE Tile(int64_t k, int64_t width, int64_t b, int64_t tile, int64_t ahead = 0)
      : b(b), j(tile * width), count(smaller(width, k - j)), ahead(ahead) {}
};

template <class T>
struct Reader {  // one tile of `Features`
  using V = Pack<compute_of<T>>;
  const T* row;  // of t = 0
  int64_t time, ahead;
  bool constant;
  int count;

  TSAE_INLINE Reader(const Features& x, const Tile& tile)
      : row(reinterpret_cast<const T*>(x.data) + tile.b * x.batch + tile.j * x.feature), time(x.time),
        ahead(tile.ahead), constant(x.feature == 0), count(tile.count) {}
  TSAE_INLINE V operator()(int64_t t) const {
    const T* at = row + t * time;
    for (unsigned i = 0; i < sizeof(Stored<T>); i += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(at + ahead) + i, 0, 2);
    return again(t);
  }
  TSAE_INLINE V again(int64_t t) const {  // what was read before: there is nothing to fetch
    const T* at = row + t * time;
    if (constant) {
      Stored<T> same;
      load_some<T>(same, at, 1);
      return splat(widen<T>(same).v[0][0]);
    }
    return widen<T>(load<T>(at, count));
  }
};

template <class T>
struct Writer {  // one tile of a contiguous result
  T* row;  // of t = 0
  int64_t time;
  int count;
  bool streamed;

  TSAE_INLINE Writer(void* data, int64_t T_, int64_t k, bool stream_results, const Tile& tile)
      : row(static_cast<T*>(data) + tile.b * T_ * k + tile.j), time(k), count(tile.count),
        streamed(stream_results && count == Pack<compute_of<T>>::width) {}
  TSAE_INLINE void operator()(int64_t t, const Stored<T>& x) const {
    if (streamed) stream<T>(row + t * time, x);
    else store<T>(row + t * time, x, count);
  }
};

// Calls block(i, run, begin, tile) for the blocks of all runs, each for tile first + i for i = 0 to tiles - 1.
//
// A tile's row is short and the next row a whole [k] away, which hardware prefetchers do not follow. While a row's page
// is at hand the best to fetch is what the next tile will read of it, in this block if tiles go together; after the last
// of those it is the first one's part of the next block.
template <int64_t width, class Block>
TSAE_INLINE void block_by_block(const Features& x, int64_t T, int64_t k, Runs runs, int64_t b, int64_t first,
                                int64_t tiles, const Block& block) {
  for (int64_t r = 0; r < runs.count; ++r) {
    const Run& run = runs.first[r];
    for (int begin = 0; begin < run.end - run.begin; begin += kBlock) {
      for (int64_t i = 0; i < tiles; ++i) {
        const bool next_tile = T <= kRowsKept || i + 1 < tiles;
        block(i, run, begin, Tile(k, width, b, first + i, next_tile ? width : kBlock * x.time - i * width));
      }
    }
  }
}

// ---- activations --------------------------------------------------------------------------------------------------

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

// In float both come from exp(-z^2/2), see normal.h.
TSAE_INLINE Normal<float> normal(const Pack<float>& z) {
  constexpr float P[] = TSAE_TAIL;
  constexpr float reciprocals[] = {1 / 720.f, 1 / 120.f, 1 / 24.f, 1 / 6.f, 0.5f, 1.f, 1.f};  // of factorials
  Normal<float> out;
  TSAE_EACH_VECTOR {
    const Floats zero{}, x = z.v[i], magnitude = x < zero ? -x : x;
    const Floats exponent = x * x * -0.5f;
    const Floats u = exponent < -87.f ? zero - 87.f : exponent;  // beyond, exp is not a normal number: taken as 0 below
    // exp(u) = 2^n exp(u - n ln 2); adding 1.5 * 2^23 rounds to a whole number and leaves it in the low bits.
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

enum class Mode { kIdentity, kRelu, kSchmitt, kGelu };

// One tile's arguments of the forward pass.
template <class T, Mode mode, class E = compute_of<T>>
struct Activate {
  using V = Pack<E>;
  const Forward& f;
  const Reader<T> pre;
  const Writer<T> h;
  const V bias, release;
  V level;
  const E* levels;  // per position

  TSAE_INLINE Activate(const Forward& f, const Tile& tile)
      : f(f), pre(f.pre, tile), h(f.h, f.T, f.k, f.stream, tile),
        bias(f.bias ? load_numbers<E>(f.bias, tile.j, tile.count) : splat(-E(0))),  // -0 changes no number, +0 does -0
        release(mode == Mode::kSchmitt ? load_numbers<E>(f.release, tile.j, tile.count) : V{}),
        level(f.level && !f.level_per_position ? load_numbers<E>(f.level, tile.j, tile.count) : V{}),
        levels(f.level_per_position ? static_cast<const E*>(f.level) + tile.b * f.T : nullptr) {}

  // Activates and writes positions [begin, end) of a run. The ring gets what was written less `centre`; total (times
  // kShrink) and square have it added. `state` is the trigger's: where it is off.
  TSAE_INLINE void operator()(const Run& run, int begin, int end, const V& centre, const Ring<E>& y, Mask<E>& state,
                              V& total, V& square) {
    Mask<E> off = state;
    for (int t = begin; t < end; ++t) {
      V z = pre(run.begin + t) + bias;
      if constexpr (mode == Mode::kRelu || mode == Mode::kSchmitt) {
        if (levels) level = splat(levels[run.begin + t]);
        if constexpr (mode == Mode::kSchmitt) {
          off = stays_off(z, level, release, run.excluded ? everywhere<E>() : off);
        } else {
          off = less_equal(z, level);
        }
        z = select(off, V{}, z);
      } else if constexpr (mode == Mode::kGelu) {
        z = z * normal(z).distribution;
      }
      const Stored<T> stored = narrow<T>(z);
      if (f.h) h(run.begin + t, stored);
      const V value = widen<T>(stored);
      y[t] = value - centre;
      total = total + value * kShrink<E>;
      square = square + value * value;
    }
    if constexpr (mode == Mode::kSchmitt) state = off;
  }
};

// What a tile of the forward pass carries from block to block.
template <class E>
struct ForwardState {
  using V = Pack<E>;
  V* rows;     // of the ring
  V* energy;   // of each band
  V* past;     // of each band, see band_block
  V centre, total, square;
  Mask<E> off;  // the trigger's
};

template <class E>
TSAE_INLINE void forward_start(const Forward& f, ForwardState<E>& at) {
  at.total = at.square = {};
  for (int64_t s = 0; s < f.S; ++s) at.energy[s] = {};
}

template <class T, Mode mode, class E = compute_of<T>>
TSAE_INLINE void forward_block(const Forward& f, const Run& run, int begin, const Tile& tile, ForwardState<E>& at) {
  using V = Pack<E>;
  const int n = run.end - run.begin, end = smaller(begin + kBlock, n);
  if (begin == 0) {
    at.centre = V{};
    at.off = everywhere<E>();
    for (int64_t s = 0; s < f.S; ++s) at.past[s] = V{};
  }
  const Ring<E> y(at.rows, f.ring, begin - (f.S > 0 ? f.bands[2 * f.S - 1] : 0) - 1);
  V part{}, part_square{};
  Activate<T, mode>(f, tile)(run, begin, end, at.centre, y, at.off, part, part_square);
  if (run.excluded) return;
  at.total = at.total + part;
  at.square = at.square + part_square;
  if (f.S == 0 || f.bands[0] >= n) return;
  if (begin == 0) {  // any centre will do that is near; the mean of the first block needs no second walk
    at.centre = part * (1 / (E(end) * kShrink<E>));
    for (int t = 0; t < end; ++t) y[t] = y[t] - at.centre;
  }
  for (int64_t s = 0; s < f.S && f.bands[2 * s] < n; ++s)
    at.energy[s] = at.energy[s] + band_block(y, begin, end, n, f.bands[2 * s], f.bands[2 * s + 1], at.past[s]);
}

template <class E>
TSAE_INLINE void forward_finish(const Forward& f, const Tile& tile, const ForwardState<E>& at) {
  using V = Pack<E>;
  // Rounding may leave a sum of squares below 0, and where the squares overflow infinities may have met. Without a NaN
  // among the features (which square would show) the true value is then infinite.
  const V infinity = splat(E(__builtin_inf()));
  const Mask<E> no_nan = equal(at.square, at.square);
  for (int64_t s = 0; s < f.S; ++s) {
    V D = at.energy[s];
    D = select(equal(D, D), select(less_equal(D, V{}), V{}, D), select(no_nan, infinity, D));
    store_numbers<E>(f.differences, (tile.b * f.S + s) * f.k + tile.j, D, tile.count);
  }
  store_numbers<E>(f.total, tile.b * f.k + tile.j, at.total * (1 / kShrink<E>), tile.count);
  store_numbers<E>(f.square, tile.b * f.k + tile.j, at.square, tile.count);
}

template <class T, Mode mode, class E = compute_of<T>>
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
    forward_block<T, mode>(f, run, begin, tile, at[i]);
  };
  block_by_block<V::width>(f.pre, f.T, f.k, runs, b, first, tiles, block);
  for (int64_t i = 0; i < tiles; ++i) forward_finish(f, Tile(f.k, V::width, b, first + i), at[i]);
}

template <class T>
void forward_tiles(const Forward& f, Runs runs, int64_t b, int64_t first, int64_t tiles, void* scratch) {
  switch (f.activation) {
    case kIdentity: return forward_tiles<T, Mode::kIdentity>(f, runs, b, first, tiles, scratch);
    case kGelu: return forward_tiles<T, Mode::kGelu>(f, runs, b, first, tiles, scratch);
    case kRelu:
      return f.release ? forward_tiles<T, Mode::kSchmitt>(f, runs, b, first, tiles, scratch)
                       : forward_tiles<T, Mode::kRelu>(f, runs, b, first, tiles, scratch);
  }
}

// What a tile of the backward pass carries from block to block.
template <class E>
struct BackwardState {
  using V = Pack<E>;
  V* rows;  // of the ring
  Window<V>* windows;
  V centre, accumulated;
  Mask<E> masked;  // features whose coefficients are all 0 get no window term, not 0 times one that may be infinite
  bool any;        // of the features is not masked
  int seen;        // rows of the run that are in the ring, or were
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
  for (int64_t r = 0; r < f.number_of_shares; ++r) {
    const Share& share = f.shares[r];
    at.windows[r].reach = share.reach;
    at.windows[r].share = share.plus < 0 ? V{} : coefficient(share.plus);
    if (share.minus >= 0) at.windows[r].share = at.windows[r].share - coefficient(share.minus);
  }
}

// The windows of a block, moved row by row. Their number is known when this is compiled, so that their sums stay in
// registers.
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
  TSAE_INLINE V pull(int t) {
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
      const V shrunk = x * kShrink<E>;
      y[t] = shrunk - centre;
      sum = sum + shrunk;
    }
    at.seen = until;
    if (begin == 0) {  // any centre will do that is near
      const V near = sum * (1 / E(until));
      for (int t = 0; t < until; ++t) y[t] = y[t] - near;
      at.centre = near;
      for (int64_t w = 0; w < f.number_of_shares; ++w) open_window(y, n, windows[w]);
    }
  }
  const auto write = [&](auto slide) TSAE_INLINE_LAMBDA {
    V accumulated = at.accumulated;
    for (int t = begin; t < end; ++t) {
      V grad = slide(t);
      // h. To fetch for the next tile once more gains 6 to 15 % where a tile goes alone, and loses as much in step.
      V x = compare && f.T > kRowsKept ? saved.again(run.begin + t) : saved(run.begin + t);
      [[maybe_unused]] V slope;  // of the activation
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
  const auto gradient = [&](const V& pull) TSAE_INLINE_LAMBDA { return select(masked, V{}, pull * (1 / kShrink<E>)); };
  const auto slide = [&]<int count>(NumberOfWindows<count>) TSAE_INLINE_LAMBDA {
    Sliding<E, count> sliding(y, begin, end, n, windows);
    write([&](int t) TSAE_INLINE_LAMBDA { return gradient(sliding.pull(t)); });
    sliding.keep(windows);
  };
  if constexpr (TSAE_VECTOR_BYTES == 64) {  // 32 registers: of 16 the windows would find none
    switch (f.number_of_shares) {
      case 1: return slide(NumberOfWindows<1>{});
      case 2: return slide(NumberOfWindows<2>{});
      case 3: return slide(NumberOfWindows<3>{});
    }
  }
  write([&](int t) TSAE_INLINE_LAMBDA {
    V pull{};
    for (int64_t w = 0; w < f.number_of_shares; ++w) pull = pull + slide_window(y, y(t), t, n, windows[w]);
    return gradient(pull);
  });
}

template <class T, Activation activation, class E = compute_of<T>>
void backward_tiles(const Backward& f, Runs runs, int64_t b, int64_t first, int64_t tiles, void* scratch) {
  using V = Pack<E>;
  BackwardState<E> at[kTilesTogether];
  V* rows = static_cast<V*>(scratch);
  for (int64_t i = 0; i < tiles; ++i, rows += f.ring + 3 * f.number_of_shares) {
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

// ---- weighted energy of single steps ------------------------------------------------------------------------------

// Rows to come are fetched where a row would be lost before the next tile reads of it.
TSAE_INLINE Tile step_tile(const Steps& f, int64_t width, int64_t b, int64_t tile) {
  return Tile(f.k, width, b, tile, f.T <= kRowsKept ? width : 16 * f.h.time);
}

template <class T, class E = compute_of<T>>
void step_energy_tile(const Steps& f, int64_t b, int64_t tile) {
  using V = Pack<E>;
  const Tile at = step_tile(f, V::width, b, tile);
  const Reader<T> h(f.h, at);
  const E* weights = static_cast<const E*>(f.weights) + b * f.T;
  double energy = 0;
  V before = h(0);
  for (int64_t begin = 1; begin < f.T; begin += kBlock) {
    V part{};
    for (int64_t t = begin; t < f.T && t < begin + kBlock; ++t) {
      const V now = h(t);
      const V step = now - before;
      if (weights[t - 1] != 0) part = part + step * step * weights[t - 1];  // a pair without weight may hold anything
      before = now;
    }
    for (int lane = 0; lane < at.count; ++lane) energy += part.v[lane / V::lanes][lane % V::lanes];
  }
  f.energy[b * ((f.k + V::width - 1) / V::width) + tile] = energy;
}

template <class T, class E = compute_of<T>>
void step_energy_backward_tile(const Steps& f, int64_t b, int64_t tile) {
  using V = Pack<E>;
  const Tile at = step_tile(f, V::width, b, tile);
  const Reader<T> h(f.h, at);
  const E* weights = static_cast<const E*>(f.weights) + b * f.T;
  const Writer<T> grad_h(f.grad_h, f.T, f.k, f.stream, at);
  V now = h(0), from_before{};
  for (int64_t t = 0; t < f.T; ++t) {
    V from_after{};
    if (t + 1 < f.T) {
      const V next = h(t + 1);
      if (weights[t] != 0) from_after = (next - now) * E(2 * f.scale * weights[t]);
      now = next;
    }
    grad_h(t, narrow<T>(from_before - from_after));
    from_before = from_after;
  }
}

// ---- by dtype -----------------------------------------------------------------------------------------------------

#define TSAE_BY_DTYPE(dtype, call)      \
  switch (dtype) {                      \
    case kDouble: call(double); break;  \
    case kFloat: call(float); break;    \
    case kBFloat16: call(BFloat16); break; \
    case kHalf: call(Half); break;      \
  }

static int64_t width(Dtype dtype) { return dtype == kDouble ? Pack<double>::width : Pack<float>::width; }
static void forward(Dtype dtype, const Forward& f, Runs runs, int64_t b, int64_t first, int64_t tiles, void* scratch) {
#define TSAE_CALL(T) forward_tiles<T>(f, runs, b, first, tiles, scratch)
  TSAE_BY_DTYPE(dtype, TSAE_CALL)
#undef TSAE_CALL
  if (f.stream) finish_streaming();
}
static void backward(Dtype dtype, const Backward& f, Runs runs, int64_t b, int64_t first, int64_t tiles,
                     void* scratch) {
#define TSAE_CALL(T)                                                                       \
  f.activation == kRelu   ? backward_tiles<T, kRelu>(f, runs, b, first, tiles, scratch)    \
  : f.activation == kGelu ? backward_tiles<T, kGelu>(f, runs, b, first, tiles, scratch)    \
                          : backward_tiles<T, kIdentity>(f, runs, b, first, tiles, scratch)
  TSAE_BY_DTYPE(dtype, TSAE_CALL)
#undef TSAE_CALL
  if (f.stream) finish_streaming();
}
static void step_energy(Dtype dtype, const Steps& f, int64_t b, int64_t tile) {
#define TSAE_CALL(T) step_energy_tile<T>(f, b, tile)
  TSAE_BY_DTYPE(dtype, TSAE_CALL)
#undef TSAE_CALL
}
static void step_energy_backward(Dtype dtype, const Steps& f, int64_t b, int64_t tile) {
#define TSAE_CALL(T) step_energy_backward_tile<T>(f, b, tile)
  TSAE_BY_DTYPE(dtype, TSAE_CALL)
#undef TSAE_CALL
  if (f.stream) finish_streaming();
}

#define TSAE_STRING(x) #x
#define TSAE_NAME(x) TSAE_STRING(x)
extern const Kernels kernels = {TSAE_NAME(TSAE_TARGET), sizeof(Pack<float>), width, forward, backward, step_energy,
                                step_energy_backward, nonzeros, weighted_sum, inner_products};

}  // namespace TSAE_TARGET
}  // namespace tsae
