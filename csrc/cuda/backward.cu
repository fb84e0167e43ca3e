// The backward pass: grad_pre and grad_bias from one read of h (for gelu, pre) and grad_h. docs/mathematics.md, section
// 2.
//
// A block is one warp with its tile of h in shared memory; grad_h passes through registers. Memory traffic per column
// (b, j) of bfloat16 [B, 128, k]: 512 bytes read, 256 written, and 12 to 24 for coefficients and grad_bias.
#include "activation.cuh"

namespace tsae::cuda {
namespace {

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

// ---- the tuned case: bands (1, 3), (4, 15) and one more -----------------------------------------------------------
//
// Windows of reach 3 and 15, and one with the third band's reach, which may cover the run. Rows that leave the first
// window come from registers; all others are read again from the tile.

constexpr int kStep = 8;  // rows at a time
constexpr int kNear = 3, kFar = 15;

// Loads the next rows of a column while the current ones are processed.
template <class T>
__device__ __forceinline__ void load_rows(const Column<T>& column, int begin, int end, Stored<T> (&rows)[kStep]) {
  if (column.paired && begin + kStep <= end) {
    const T* from = column.at + begin * column.time;
#pragma unroll
    for (int i = 0; i < kStep; ++i, from += column.time) rows[i] = *reinterpret_cast<const Stored<T>*>(from);
  } else {
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      if (begin + i < end) rows[i] = column.stored(begin + i);
    }
  }
}

template <class V>
struct Windows {
  V weight[3];     // g_s - g_{s+1} for each window
  V near, far, third;
  V ring[kStep];   // ring[i]: y of the latest row that is i mod kStep, up to row t + 3
  int reach;       // of the third window
  bool everywhere; // the third window covers the run
};

template <class V, class Rows>
__device__ __forceinline__ void open_windows(const Rows& y, int n, Windows<V>& w) {
  w.near = w.far = w.third = V{};
#pragma unroll
  for (int i = 0; i < kStep; ++i) {
    w.ring[i] = V{};
    if (i < kNear && i < n) w.near = w.near + (w.ring[i] = y(i));
  }
#pragma unroll 5
  for (int t = 0; t < smaller(kFar, n); ++t) w.far = w.far + y(t);
  w.everywhere = w.reach >= n - 1;
  for (int begin = 0; begin < (w.everywhere ? n : w.reach); begin += kBlock) {
    V part{};
#pragma unroll 8
    for (int t = begin; t < smaller(begin + kBlock, w.everywhere ? n : w.reach); ++t) part = part + y(t);
    w.third = w.third + part;
  }
}

// Half of the window term at t, where t mod kStep = i. `complete`: the windows of reach 3 and 15 are within the run.
template <bool complete, class V, class Rows>
__device__ __forceinline__ V slide_windows(const Rows& y, int i, int t, int n, Windows<V>& w) {
  using E = element_of<V>;
  const V now = w.ring[i % kStep];
  V entering{};
  if (complete || t + kNear < n) entering = y(t + kNear);
  w.near = w.near + (entering - w.ring[(i + kStep - kNear - 1) % kStep]);
  w.ring[(i + kNear) % kStep] = entering;
  if (complete || t + kFar < n) w.far = w.far + y(t + kFar);
  if (complete || t > kFar) w.far = w.far - y(t - kFar - 1);
  int third_count = n;
  if (!w.everywhere) {
    if (t + w.reach < n) w.third = w.third + y(t + w.reach);
    if (t > w.reach) w.third = w.third - y(t - w.reach - 1);
    third_count = window_count(t, n, w.reach);
  }
  const E near_count = complete ? E(2 * kNear + 1) : E(window_count(t, n, kNear));
  const E far_count = complete ? E(2 * kFar + 1) : E(window_count(t, n, kFar));
  return w.weight[0] * (now * near_count - w.near) + w.weight[1] * (now * far_count - w.far) +
         w.weight[2] * (now * E(third_count) - w.third);
}

template <class T, Activation activation>
__global__ void __launch_bounds__(kLanes, kResident<T>) backward_multiscale(const __grid_constant__ Backward f) {
  using E = compute_of<T>;
  using V = Pair<E>;
  const Place place = place_of(f.k, kTile);
  fill_tile<T>(f.saved, f.T, f.k, place);
  Gradient<T> gradient(f, place);
  await_copies();
  const bool any = __syncthreads_or(gradient.has_windows());  // any feature of this tile
  if (place.count == 0) return;

  const TileColumn<T> tiled{tile<T>() + threadIdx.x};
  const Column<T> saved(f.saved, place), incoming(f.grad_h, place);
  if (activation == kGelu && any) gelu_in_place<T>(tiled.at, f.T, gradient.bias);
  const int* ends = f.ends ? f.ends + place.b * f.T : nullptr;
  const bool has_grad_h = f.grad_h.x.data;
  T* to = static_cast<T*>(f.grad_pre) + place.b * f.T * f.k + place.j;
  Windows<V> windows;
  windows.reach = f.S > 2 ? f.bands[5] : kFar;
  if (any) {
    const V near = gradient.coefficient(place, 0), far = gradient.coefficient(place, 1);
    const V third = f.S > 2 ? gradient.coefficient(place, 2) : V{};
    windows.weight[0] = near - far;
    windows.weight[1] = far - third;
    windows.weight[2] = third;
  }

  for (int next = 0; next < f.T;) {
    const Run run = run_at(ends, next, f.T);
    next = run.end;
    const int n = run.end - run.begin;
    const bool compare = any && !run.excluded && n > 1;
    const TileColumn<T> x = tiled.from(run.begin);
    const Column<T> z = saved.from(run.begin), grad_h = incoming.from(run.begin);
    Stored<T> grads[kStep] = {}, later[kStep] = {};
    if (has_grad_h) load_rows(grad_h, 0, n, grads);
    const ScaledCentred<TileColumn<T>, V> y{x, compare ? scaled_centre_of(x, n) : V{}};
    if (compare) open_windows(y, n, windows);

    for (int begin = 0; begin < n; begin += kStep) {
      if (has_grad_h) load_rows(grad_h, begin + kStep, n, later);
      const auto row = [&](int i, const V& window_term) {
        const int t = begin + i;
        if constexpr (activation == kGelu) {
          const Gelu<T> gelu(z(t) + gradient.bias);
          *reinterpret_cast<Stored<T>*>(to) =
              gradient.template of_pre<activation>(window_term, widen<T>(gelu.value), gelu.slope, run.excluded, grads[i]);
        } else {
          *reinterpret_cast<Stored<T>*>(to) =
              gradient.template of_pre<activation>(window_term, x(t), V{}, run.excluded, grads[i]);
        }
        to += f.k;
      };
      if (compare && begin > kFar && begin + kStep - 1 + kFar < n) {
#pragma unroll
        for (int i = 0; i < kStep; ++i) row(i, slide_windows<true>(y, i, begin + i, n, windows));
      } else {
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
          if (begin + i < n) row(i, compare ? slide_windows<false>(y, i, begin + i, n, windows) : V{});
        }
      }
#pragma unroll
      for (int i = 0; i < kStep; ++i) grads[i] = later[i];
    }
  }
  gradient.write_bias(place);
}

// ---- any bands, any T ---------------------------------------------------------------------------------------------

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

template <class T, int kWindows>
__global__ void __launch_bounds__(kLanes, 8) backward_any(const __grid_constant__ Backward f) {
  using E = compute_of<T>;
  using V = Pair<E>;
  const Place place = place_of(f.k, kTile);
  const bool tiled = tile_bytes<T>(f.T) <= kMostTileBytes;
  if (tiled) fill_tile<T>(f.saved, f.T, f.k, place);
  Gradient<T> gradient(f, place);
  await_copies();
  const bool any = __syncthreads_or(gradient.has_windows());
  if (place.count == 0) return;

  Stored<T>* const column = tile<T>() + threadIdx.x;
  const bool gelu = f.activation == kGelu;
  if (gelu && tiled && any) gelu_in_place<T>(column, f.T, gradient.bias);
  const Column<T> saved(f.saved, place), grad_h(f.grad_h, place), source = tiled ? Column<T>(column) : saved;
  const Output<T> grad_pre(f.grad_pre, f.T, f.k, f.paired, place);
  const int* ends = f.ends ? f.ends + place.b * f.T : nullptr;
  Window<V> windows[kWindows];  // in registers: with unrolled loops every index is a constant
  if (any) {
#pragma unroll
    for (int w = 0; w < kWindows; ++w) {
      if (w < f.number_of_windows) {
        windows[w].reach = f.windows[w].reach;
        windows[w].weight = gradient.coefficient(place, f.windows[w].plus) - gradient.coefficient(place, f.windows[w].minus);
      }
    }
  }
  for (int next = 0; next < f.T;) {
    const Run run = run_at(ends, next, f.T);
    next = run.end;
    const int n = run.end - run.begin;
    const bool compare = any && !run.excluded && n > 1;
    const Values<T> x{source.from(run.begin), gelu && !tiled, gradient.bias};
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
      const Stored<T> incoming = f.grad_h.x.data ? grad_h.stored(at) : Stored<T>{};
      if (gelu) {
        const Gelu<T> here(saved(at) + gradient.bias);
        out = gradient.template of_pre<kGelu>(window_term, widen<T>(here.value), here.slope, run.excluded, incoming);
      } else if (f.activation == kRelu) {
        out = gradient.template of_pre<kRelu>(window_term, source(at), V{}, run.excluded, incoming);
      } else {
        out = gradient.template of_pre<kIdentity>(window_term, source(at), V{}, run.excluded, incoming);
      }
      grad_pre(at, out);
    }
  }
  gradient.write_bias(place);
}

template <class T>
const char* backward_of(const Backward& f, void* stream) {
  const int64_t blocks = f.B * ((f.k + kTile - 1) / kTile), bytes = tile_bytes<T>(f.T);
  if constexpr (sizeof(T) < 8) {
    if (is_tuned(f.S, f.bands, f.k, bytes)) {
      const auto kernel = f.activation == kIdentity ? backward_multiscale<T, kIdentity>
                          : f.activation == kGelu   ? backward_multiscale<T, kGelu>
                                                    : backward_multiscale<T, kRelu>;
      return launch(kernel, blocks, kLanes, bytes, stream, f);
    }
  }
  const int64_t shared = bytes <= kMostTileBytes ? bytes : 0;
  const auto kernel = f.number_of_windows <= 4 ? backward_any<T, 4> : backward_any<T, kMostWindows>;
  return launch(kernel, blocks, kLanes, shared, stream, f);
}

}  // namespace

const char* backward(const Backward& f, void* stream) {
  return with_dtype(f.dtype, [&](auto element) { return backward_of<decltype(element)>(f, stream); });
}

}  // namespace tsae::cuda
