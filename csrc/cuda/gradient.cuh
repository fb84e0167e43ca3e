// The parts of the backward pass that its kernels share: the gradient at one position apart from the windows, and one
// run with any windows. docs/mathematics.md, section 2.
#pragma once

#include "activation.cuh"

namespace tsae::cuda {

// The gradient of this thread's features, apart from the window terms: values shared by all positions, and the sum over
// T.
template <class T>
struct Gradient {
  using E = compute_of<T>;
  using V = Pair<E>;
  const Backward& f;
  V bias, of_total, of_square;
  Mask masked;  // features whose coefficients are all 0: no window term, as 0 times an infinite one would be NaN
  V accumulated{};

  __device__ __forceinline__ Gradient(const Backward& f, const Place& place) : f(f) {
    const int64_t at = place.b * f.k + place.j;
    bias = f.bias ? load_numbers<E>(f.bias, place.j, place.count) : V{};
    of_total = f.grad_total ? load_numbers<E>(f.grad_total, at, place.count) : V{};
    of_square = f.grad_square ? load_numbers<E>(f.grad_square, at, place.count) * E(2) : V{};
    masked = {true, true};
    if (f.grad_differences) {
      for (int s = 0; s < f.S; ++s) masked = masked & equal(coefficient(place, s), V{});
    }
  }
  __device__ __forceinline__ V coefficient(const Place& place, int s) const {
    if (s < 0) return V{};
    return load_numbers<E>(f.grad_differences, place.b * f.differences_batch + s * f.k + place.j, place.count) * E(2);
  }
  __device__ __forceinline__ bool has_windows() const { return !(masked.a && masked.b); }

  // window_term: times kSumScale. h and slope: the activation's value and derivative.
  template <Activation activation>
  __device__ __forceinline__ Stored<T> of_pre(const V& window_term, const V& h, const V& slope, bool excluded,
                                              const Stored<T>& grad_h) {
    V grad = select(masked, V{}, window_term * kInverseSumScale<E>);
    if (f.grad_total && !excluded) grad = grad + of_total;
    if (f.grad_square && !excluded) grad = grad + of_square * h;
    if (f.grad_h.x.data) grad = grad + widen<T>(grad_h);
    if constexpr (activation == kRelu) grad = select(less_equal(h, V{}), V{}, grad);
    if constexpr (activation == kGelu) grad = grad * slope;
    accumulated = accumulated + grad;
    return narrow<T>(grad);
  }
  __device__ __forceinline__ void write_bias(const Place& place) const {
    store_numbers(f.grad_bias, place.b * f.k + place.j, accumulated, f.paired, place.count);
  }
};

// For gelu the tile holds pre, but the windows need h.
template <class T>
__device__ __forceinline__ void gelu_in_place(Stored<T>* column, int T_, const Pair<compute_of<T>>& bias) {
#pragma unroll 4
  for (int t = 0; t < T_; ++t) column[t * kLanes] = Gelu<T>(widen<T>(column[t * kLanes]) + bias).value;
}

// h from the tile or from global memory; for gelu without a tile, computed from pre.
template <class T>
struct Values {
  using V = Pair<compute_of<T>>;
  Column<T> x;
  bool activate;
  V bias;
  __device__ __forceinline__ V operator()(int t) const {
    const V value = x(t);
    return activate ? widen<T>(Gelu<T>(value + bias).value) : value;
  }
};

// This thread's columns. saved: h, or for gelu pre; source: the same, from the fastest memory; for gelu it holds h if
// `activated`.
template <class T>
struct Columns {
  Column<T> source, saved, grad_h;
  Output<T> grad_pre;
  bool activated;
};

// The windows of `f`, at most kWindows, and their weights. In registers: with unrolled loops every index is a constant.
template <class T, int kWindows>
__device__ __forceinline__ void load_windows(const Gradient<T>& gradient, const Place& place,
                                             Window<Pair<compute_of<T>>> (&windows)[kWindows]) {
  const Backward& f = gradient.f;
#pragma unroll
  for (int w = 0; w < kWindows; ++w) {
    if (w < f.number_of_windows) {
      windows[w].reach = f.windows[w].reach;
      windows[w].weight = gradient.coefficient(place, f.windows[w].plus) - gradient.coefficient(place, f.windows[w].minus);
    }
  }
}

// One run. `compare`: with window terms.
template <class T, int kWindows>
__device__ __forceinline__ void any_run(const Run& run, const Columns<T>& columns, bool compare, Gradient<T>& gradient,
                                        Window<Pair<compute_of<T>>> (&windows)[kWindows]) {
  using V = Pair<compute_of<T>>;
  const Backward& f = gradient.f;
  const bool gelu = f.activation == kGelu;
  const int n = run.end - run.begin;
  const Values<T> x{columns.source.from(run.begin), gelu && !columns.activated, gradient.bias};
  const ScaledCentred<Values<T>, V> y{x, compare ? scaled_centre_of(x, n) : V{}};
  if (compare) {
#pragma unroll
    for (int w = 0; w < kWindows; ++w) {
      if (w < f.number_of_windows) open_window(y, n, windows[w]);
    }
  }
  for (int t = 0; t < n; ++t) {
    V window_term{};
    if (compare) {
      const V now = y(t);
#pragma unroll
      for (int w = 0; w < kWindows; ++w) {
        if (w < f.number_of_windows) window_term = window_term + slide_window(y, now, t, n, windows[w]);
      }
    }
    const int at = run.begin + t;
    Stored<T> out;
    const Stored<T> incoming = f.grad_h.x.data ? columns.grad_h.stored(at) : Stored<T>{};
    if (gelu) {
      const Gelu<T> here(columns.saved(at) + gradient.bias);
      out = gradient.template of_pre<kGelu>(window_term, widen<T>(here.value), here.slope, run.excluded, incoming);
    } else if (f.activation == kRelu) {
      out = gradient.template of_pre<kRelu>(window_term, columns.source(at), V{}, run.excluded, incoming);
    } else {
      out = gradient.template of_pre<kIdentity>(window_term, columns.source(at), V{}, run.excluded, incoming);
    }
    columns.grad_pre(at, out);
  }
}

}  // namespace tsae::cuda
