// The gradient in one pass: h (or for gelu pre) and grad_h are read once, grad_pre and grad_bias are written.
//
// A block is one warp with its tile of h in shared memory; grad_h passes through registers. Bytes of bfloat16 [B, 128, k]:
// 512 read, 256 written and 12 to 24 of coefficients and grad_bias a column.
#include "tile.cuh"

namespace tsae::cuda {
namespace {

// What all positions of this thread's features have in common, and what follows the window arithmetic at each.
template <class T>
struct Gradient {
  using E = compute_of<T>;
  using V = Pair<E>;
  const Backward& f;
  V bias, of_total, of_square;
  Mask masked;  // features whose coefficients are all 0 get no window term, not 0 times one that may be infinite
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

  // pull: the window term times kShrink. h and slope: the activation's value and derivative.
  template <Activation activation>
  __device__ __forceinline__ Stored<T> of_pre(const V& pull, const V& h, const V& slope, bool excluded,
                                              const Stored<T>& grad_h) {
    V grad = select(masked, V{}, pull * kGrow<E>);
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

// For gelu the tile holds pre; the windows need h.
template <class T>
__device__ __forceinline__ void gelu_in_place(Stored<T>* column, int T_, const Pair<compute_of<T>>& bias) {
#pragma unroll 4
  for (int t = 0; t < T_; ++t) column[t * kLanes] = Gelu<T>(widen<T>(column[t * kLanes]) + bias).value;
}

// ---- the tuned case: bands (1, 3), (4, 15) and one beyond ---------------------------------------------------------
//
// Windows of reach 3 and 15, and one that reaches as far as the third band: over the whole run if that is long enough.
// Rows that slide out of the first window come from registers, all others are read again from the tile.

constexpr int kStep = 8;  // rows at a time
constexpr int kNear = 3, kFar = 15;

// The next rows of a column, on their way while the current ones are worked on.
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
  V share[3];      // of the windows, what the bands that end or begin there contribute
  V near, far, third;
  V ring[kStep];   // ring[i]: the latest y whose row is i mod kStep, as far as t + 3
  int reach;       // of the third
  bool everywhere; // the third reaches everywhere
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

// Half of the window term at t, with t mod kStep = i. `complete`: the windows of reach 3 and 15 lie within the run.
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
  return w.share[0] * (now * near_count - w.near) + w.share[1] * (now * far_count - w.far) +
         w.share[2] * (now * E(third_count) - w.third);
}

template <class T, Activation activation>
__global__ void __launch_bounds__(kLanes, kResident<T>) backward_multiscale(const __grid_constant__ Backward f) {
  using E = compute_of<T>;
  using V = Pair<E>;
  const Place place = place_of(f.k, kTile);
  fill_tile<T>(f.saved, f.T, f.k, place);
  Gradient<T> gradient(f, place);
  await_copies();
  const bool any = __syncthreads_or(gradient.has_windows());  // of the features of this tile
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
    windows.share[0] = near - far;
    windows.share[1] = far - third;
    windows.share[2] = third;
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
    const Shrunk<TileColumn<T>, V> y{x, compare ? shrunk_level(x, n) : V{}};
    if (compare) open_windows(y, n, windows);

    for (int begin = 0; begin < n; begin += kStep) {
      if (has_grad_h) load_rows(grad_h, begin + kStep, n, later);
      const auto row = [&](int i, const V& pull) {
        const int t = begin + i;
        if constexpr (activation == kGelu) {
          const Gelu<T> gelu(z(t) + gradient.bias);
          *reinterpret_cast<Stored<T>*>(to) =
              gradient.template of_pre<activation>(pull, widen<T>(gelu.value), gelu.slope, run.excluded, grads[i]);
        } else {
          *reinterpret_cast<Stored<T>*>(to) =
              gradient.template of_pre<activation>(pull, x(t), V{}, run.excluded, grads[i]);
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

// h: from the tile or from global memory, for gelu from pre if there is no tile.
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
  Window<V> windows[kWindows];  // in registers: every index is a constant once the loops are unrolled
  if (any) {
#pragma unroll
    for (int w = 0; w < kWindows; ++w) {
      if (w < f.number_of_windows) {
        windows[w].reach = f.windows[w].reach;
        windows[w].share = gradient.coefficient(place, f.windows[w].plus) - gradient.coefficient(place, f.windows[w].minus);
      }
    }
  }
  for (int next = 0; next < f.T;) {
    const Run run = run_at(ends, next, f.T);
    next = run.end;
    const int n = run.end - run.begin;
    const bool compare = any && !run.excluded && n > 1;
    const Values<T> x{source.from(run.begin), gelu && !tiled, gradient.bias};
    const Shrunk<Values<T>, V> y{x, compare ? shrunk_level(x, n) : V{}};
    if (compare) {
#pragma unroll
      for (int w = 0; w < kWindows; ++w) {
        if (w < f.number_of_windows) open_window(y, n, windows[w]);
      }
    }
    for (int t = 0; t < n; ++t) {
      V pull{};
      if (compare) {
        const V now = y(t);
#pragma unroll
        for (int w = 0; w < kWindows; ++w) {
          if (w < f.number_of_windows) pull = pull + slide_window(y, now, t, n, windows[w]);
        }
      }
      const int at = run.begin + t;
      Stored<T> out;
      const Stored<T> incoming = f.grad_h.x.data ? grad_h.stored(at) : Stored<T>{};
      if (gelu) {
        const Gelu<T> here(saved(at) + gradient.bias);
        out = gradient.template of_pre<kGelu>(pull, widen<T>(here.value), here.slope, run.excluded, incoming);
      } else if (f.activation == kRelu) {
        out = gradient.template of_pre<kRelu>(pull, source(at), V{}, run.excluded, incoming);
      } else {
        out = gradient.template of_pre<kIdentity>(pull, source(at), V{}, run.excluded, incoming);
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
  switch (f.dtype) {
    case kDouble: return backward_of<double>(f, stream);
    case kFloat: return backward_of<float>(f, stream);
    case kBFloat16: return backward_of<BFloat16>(f, stream);
    default: return backward_of<Half>(f, stream);
  }
}

}  // namespace tsae::cuda
