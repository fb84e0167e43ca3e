// The kernels for one tile: one pack of features of one sequence, walked along T. Included once per instruction set.
//
// A tile's row is a cache line or a few, so a walk along T reads the features once from memory. It goes block by block:
// what the windows need of the rows before and ahead lies in a ring in `scratch`, in the first- or second-level cache
// however long the sequence is.
#pragma once

#include "../normal.h"
#include "kernels.h"
#include "pack.h"
#include "sparse.h"

namespace tsae {
namespace TSAE_TARGET {

// Centred float features are scaled by 2^-16 where they are only summed, so that no sum overflows before the result
// does, even for bfloat16 of 3e38. Exact, as it is a power of two.
template <class E>
constexpr E kShrink = E(1) / 65536;

// A tile's row is short and the next row a whole [k] away, which hardware prefetchers do not follow. While a row's page
// is at hand the best to fetch is what the next tile will read of it (measured: 2 copies' worth of time down to 1.4);
// with more rows than that the cache would lose it again, and rows to come are fetched instead.
constexpr int kRowsKept = 256;
constexpr int kRowsAhead = 16;

template <class T>
struct Reader {  // one tile of `Features`
  using V = Pack<compute_of<T>>;
  const T* row;  // of t = 0
  int64_t time, ahead;
  bool constant;
  int count;

  TSAE_INLINE Reader(const Features& x, int64_t T_, int64_t b, int64_t j, int count)
      : row(reinterpret_cast<const T*>(x.data) + b * x.batch + j * x.feature), time(x.time),
        ahead(T_ <= kRowsKept ? V::width : kRowsAhead * x.time), constant(x.feature == 0), count(count) {}
  TSAE_INLINE V operator()(int64_t t) const {
    const T* at = row + t * time;
    for (unsigned i = 0; i < sizeof(Stored<T>); i += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(at + ahead) + i, 0, 2);
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

  TSAE_INLINE Writer(void* data, int64_t T_, int64_t k, bool stream_results, int64_t b, int64_t j, int count)
      : row(static_cast<T*>(data) + b * T_ * k + j), time(k), count(count),
        streamed(stream_results && count == Pack<compute_of<T>>::width) {}
  TSAE_INLINE void operator()(int64_t t, const Stored<T>& x) const {
    if (streamed) stream<T>(row + t * time, x);
    else store<T>(row + t * time, x, count);
  }
};

template <class E>
struct Ring {  // Rows of the recurrence: the last of a run, 2^n of them
  Pack<E>* rows;
  int64_t size;
  TSAE_INLINE Pack<E>& operator[](int t) const { return rows[t & (size - 1)]; }
  TSAE_INLINE Pack<E> operator()(int t) const { return rows[t & (size - 1)]; }
};

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

// One tile's arguments of the forward pass, loaded once.
template <class T, Mode mode, class E = compute_of<T>>
struct Activate {
  using V = Pack<E>;
  const Forward& f;
  const Reader<T> pre;
  const Writer<T> h;
  const V bias, release;
  V level;
  const E* levels;  // per position

  TSAE_INLINE Activate(const Forward& f, int64_t b, int64_t j, int count)
      : f(f), pre(f.pre, f.T, b, j, count), h(f.h, f.T, f.k, f.stream, b, j, count),
        bias(f.bias ? load_numbers<E>(f.bias, j, count) : splat(-E(0))),  // -0 changes no number, +0 does -0
        release(mode == Mode::kSchmitt ? load_numbers<E>(f.release, j, count) : V{}),
        level(f.level && !f.level_per_position ? load_numbers<E>(f.level, j, count) : V{}),
        levels(f.level_per_position ? static_cast<const E*>(f.level) + b * f.T : nullptr) {}

  // Activates and writes positions [begin, end) of a run. The ring gets what was written less `centre`; total (times
  // kShrink) and square have it added. `off` is the trigger's state.
  TSAE_INLINE void operator()(const Run& run, int begin, int end, const V& centre, const Ring<E>& y, Mask<E>& off,
                              V& total, V& square) {
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
  }
};

// scratch: ring + 2 S packs.
template <class T, Mode mode, class E = compute_of<T>>
void forward_tile(const Forward& f, Runs runs, int64_t b, int64_t tile, void* scratch) {
  using V = Pack<E>;
  const int64_t j = tile * V::width;
  const int count = smaller(V::width, f.k - j);
  Activate<T, mode> activate(f, b, j, count);
  const Ring<E> y{static_cast<V*>(scratch), f.ring};
  V* energy = y.rows + y.size;  // of each band
  V* past = energy + f.S;
  V total{}, square{};
  for (int64_t s = 0; s < f.S; ++s) energy[s] = V{};

  for (int64_t r = 0; r < runs.count; ++r) {
    const Run& run = runs.first[r];
    const int n = run.end - run.begin;
    const bool compare = !run.excluded && f.S > 0 && f.bands[0] < n;
    V centre{};
    Mask<E> off = everywhere<E>();
    for (int64_t s = 0; s < f.S; ++s) past[s] = V{};
    for (int begin = 0; begin < n; begin += kBlock) {
      const int end = smaller(begin + kBlock, n);
      V part{}, part_square{};
      activate(run, begin, end, centre, y, off, part, part_square);
      if (!run.excluded) {
        total = total + part;
        square = square + part_square;
      }
      if (!compare) continue;
      if (begin == 0) {  // any centre will do that is near; the mean of the first block needs no second walk
        centre = part * (1 / (E(end) * kShrink<E>));
        for (int t = 0; t < end; ++t) y[t] = y[t] - centre;
      }
      for (int64_t s = 0; s < f.S && f.bands[2 * s] < n; ++s)
        energy[s] = energy[s] + band_block(y, begin, end, n, f.bands[2 * s], f.bands[2 * s + 1], past[s]);
    }
  }
  // Rounding may leave a sum of squares below 0, and where the squares overflow infinities may have met. Without a NaN
  // among the features (which square would show) the true value is then infinite.
  const V infinity = splat(E(__builtin_inf()));
  const Mask<E> no_nan = equal(square, square);
  for (int64_t s = 0; s < f.S; ++s) {
    V D = energy[s];
    D = select(equal(D, D), select(less_equal(D, V{}), V{}, D), select(no_nan, infinity, D));
    store_numbers<E>(f.differences, (b * f.S + s) * f.k + j, D, count);
  }
  store_numbers<E>(f.total, b * f.k + j, total * (1 / kShrink<E>), count);
  store_numbers<E>(f.square, b * f.k + j, square, count);
}

template <class T>
void forward_tile(const Forward& f, Runs runs, int64_t b, int64_t tile, void* scratch) {
  switch (f.activation) {
    case kIdentity: return forward_tile<T, Mode::kIdentity>(f, runs, b, tile, scratch);
    case kGelu: return forward_tile<T, Mode::kGelu>(f, runs, b, tile, scratch);
    case kRelu:
      return f.release ? forward_tile<T, Mode::kSchmitt>(f, runs, b, tile, scratch)
                       : forward_tile<T, Mode::kRelu>(f, runs, b, tile, scratch);
  }
}

// scratch: ring + 3 number_of_shares packs.
template <class T, Activation activation, class E = compute_of<T>>
void backward_tile(const Backward& f, Runs runs, int64_t b, int64_t tile, void* scratch) {
  using V = Pack<E>;
  const int64_t j = tile * V::width;
  const int count = smaller(V::width, f.k - j);
  const Ring<E> y{static_cast<V*>(scratch), f.ring};
  Window<V>* windows = reinterpret_cast<Window<V>*>(y.rows + y.size);
  const Reader<T> saved(f.saved, f.T, b, j, count);
  const Reader<T> grad_h(f.grad_h, f.T, b, j, count);
  const V bias = f.bias ? load_numbers<E>(f.bias, j, count) : V{};
  const V of_total = f.grad_total ? load_numbers<E>(f.grad_total, b * f.k + j, count) : V{};
  const V of_square = f.grad_square ? load_numbers<E>(f.grad_square, b * f.k + j, count) * E(2) : V{};
  const Writer<T> grad_pre(f.grad_pre, f.T, f.k, f.stream, b, j, count);
  V accumulated{};

  // Features whose coefficients are all 0 get no window term, not 0 times one that may be infinite.
  Mask<E> masked = everywhere<E>();
  const auto coefficient = [&](int64_t s) {
    return load_numbers<E>(f.grad_differences, b * f.differences_batch + s * f.k + j, count) * E(2);
  };
  bool any = false;
  if (f.grad_differences) {
    for (int64_t s = 0; s < f.S; ++s) masked = masked & equal(coefficient(s), V{});
    for (int lane = 0; lane < count; ++lane) any |= !masked.v[lane / V::lanes][lane % V::lanes];
  }
  if (any) {
    for (int64_t r = 0; r < f.number_of_shares; ++r) {
      const Share& share = f.shares[r];
      windows[r].reach = share.reach;
      windows[r].share = share.plus < 0 ? V{} : coefficient(share.plus);
      if (share.minus >= 0) windows[r].share = windows[r].share - coefficient(share.minus);
    }
  }

  for (int64_t r = 0; r < runs.count; ++r) {
    const Run& run = runs.first[r];
    const int n = run.end - run.begin;
    const bool compare = any && !run.excluded && n > 1;
    V centre{};
    for (int begin = 0, seen = 0; begin < n; begin += kBlock) {
      const int end = smaller(begin + kBlock, n);
      if (compare) {
        const int ahead = smaller(end + f.reach, n);
        V sum{};
        for (int t = seen; t < ahead; ++t) {
          V x = saved(run.begin + t);
          if constexpr (activation == kGelu) {
            x = x + bias;
            x = widen<T>(narrow<T>(x * normal(x).distribution));
          }
          const V shrunk = x * kShrink<E>;
          y[t] = shrunk - centre;
          sum = sum + shrunk;
        }
        seen = ahead;
        if (begin == 0) {  // any centre will do that is near
          centre = sum * (1 / E(ahead));
          for (int t = 0; t < ahead; ++t) y[t] = y[t] - centre;
          for (int64_t w = 0; w < f.number_of_shares; ++w) open_window(y, n, windows[w]);
        }
      }
      for (int t = begin; t < end; ++t) {
        V grad{};
        if (compare) {
          const V pull = window_pull(y, t, n, windows, f.number_of_shares);
          grad = select(masked, V{}, pull * (1 / kShrink<E>));
        }
        V x = saved(run.begin + t);  // h
        [[maybe_unused]] V slope;    // of the activation
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
    }
  }
  store_numbers<E>(f.grad_bias, b * f.k + j, accumulated, count);
}

// ---- weighted energy of single steps ------------------------------------------------------------------------------

template <class T, class E = compute_of<T>>
void step_energy_tile(const Steps& f, int64_t b, int64_t tile) {
  using V = Pack<E>;
  const int64_t j = tile * V::width;
  const int count = smaller(V::width, f.k - j);
  const Reader<T> h(f.h, f.T, b, j, count);
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
    for (int lane = 0; lane < count; ++lane) energy += part.v[lane / V::lanes][lane % V::lanes];
  }
  f.energy[b * ((f.k + V::width - 1) / V::width) + tile] = energy;
}

template <class T, class E = compute_of<T>>
void step_energy_backward_tile(const Steps& f, int64_t b, int64_t tile) {
  using V = Pack<E>;
  const int64_t j = tile * V::width;
  const int count = smaller(V::width, f.k - j);
  const Reader<T> h(f.h, f.T, b, j, count);
  const E* weights = static_cast<const E*>(f.weights) + b * f.T;
  const Writer<T> grad_h(f.grad_h, f.T, f.k, f.stream, b, j, count);
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
static void forward(Dtype dtype, const Forward& f, Runs runs, int64_t b, int64_t tile, void* scratch) {
#define TSAE_CALL(T) forward_tile<T>(f, runs, b, tile, scratch)
  TSAE_BY_DTYPE(dtype, TSAE_CALL)
#undef TSAE_CALL
  if (f.stream) finish_streaming();
}
static void backward(Dtype dtype, const Backward& f, Runs runs, int64_t b, int64_t tile, void* scratch) {
#define TSAE_CALL(T)                                                                  \
  f.activation == kRelu   ? backward_tile<T, kRelu>(f, runs, b, tile, scratch)        \
  : f.activation == kGelu ? backward_tile<T, kGelu>(f, runs, b, tile, scratch)        \
                          : backward_tile<T, kIdentity>(f, runs, b, tile, scratch)
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
