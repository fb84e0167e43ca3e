// The sliding-window recurrence over one segment, shared by host and device kernels.
//
// Derivations: docs/mathematics.md, sections 2 to 4 and 7. `V` is the value of one feature, or of several neighbouring
// features at once: a number on the device, a pack of SIMD vectors on the host. It needs + - *, a product with its
// element type, and the functions `less_equal` and `select`. `Rows` gives y(t), the segment's centred features.
//
// Nothing here has a symbol of its own: the host kernels are compiled once per instruction set,
// and a function that the linker could share between them might run instructions that the machine lacks.
#pragma once

#include "features.h"

#ifdef __CUDACC__
#define TSAE_INLINE __host__ __device__ __forceinline__
#else
#define TSAE_INLINE inline __attribute__((always_inline))
#endif

#ifndef TSAE_TARGET
#define TSAE_TARGET device
#endif

namespace tsae {
namespace TSAE_TARGET {

template <class V>
struct ElementOf {
  using type = V;
};
template <class V>
using element_of = typename ElementOf<V>::type;

// A window that slides is summed afresh after this many steps, before rounding has made it drift.
constexpr int kRefresh = 4 * kBlock;

// Up to this many offsets a band is summed pair by pair: as fast as the window, and exact to rounding even where a
// feature changes so slowly that the differences are far smaller than the feature (mathematics, section 4).
constexpr int kNarrow = 4;

TSAE_INLINE int smaller(int a, int b) { return a < b ? a : b; }
TSAE_INLINE int larger(int a, int b) { return a > b ? a : b; }

// How many positions u of a segment of n have |u - t| <= reach.
TSAE_INLINE int window_count(int t, int n, int reach) { return smaller(t + reach, n - 1) - larger(t - reach, 0) + 1; }

// Schmitt trigger: off at this position? `off_before` must be true where no state is carried over. Written with <=
// so that NaN stays on and is seen.
template <class V, class Mask>
TSAE_INLINE Mask stays_off(const V& z, const V& level, const V& release, const Mask& off_before) {
  return less_equal(z, level) & (less_equal(z, release) | off_before);
}

// The part of one block, t in [begin, end), of D of the band (first, last) over a segment of n positions. A segment's
// blocks are to be asked for in turn, the first with `past` 0; all but the last have kBlock positions.
template <class V, class Rows>
TSAE_INLINE V band_block(const Rows& y, int begin, int end, int n, int first, int last, V& past) {
  using E = element_of<V>;
  V energy{};
  if (last - first < kNarrow) {
    for (int offset = first; offset <= last; ++offset) {
      V part{};
      for (int t = larger(begin, offset); t < end; ++t) {
        const V step = y(t) - y(t - offset);
        part = part + step * step;
      }
      energy = energy + part;
    }
    return energy;
  }
  // `past` is F_t, the sum of y over [t - last, t - first].
  if (begin > 0 && begin % kRefresh == 0) {
    past = V{};
    for (int u = larger(begin - 1 - last, 0); u <= begin - 1 - first; ++u) past = past + y(u);
  }
  for (int t = begin; t < end; ++t) {
    if (t >= first) past = past + y(t - first);
    if (t > last) past = past - y(t - last - 1);
    const int degree = window_count(t, n, last) - window_count(t, n, first - 1);
    energy = energy + y(t) * (past - y(t) * (E(0.5) * E(degree)));
  }
  return energy * E(-2);
}

// D of the band (first, last) over a segment of n positions.
template <class V, class Rows>
TSAE_INLINE V band_energy(const Rows& y, int n, int first, int last) {
  V energy{}, past{};
  for (int begin = 0; begin < n; begin += kBlock) {
    energy = energy + band_block(y, begin, smaller(begin + kBlock, n), n, first, last, past);
  }
  return energy;
}

// One window of the backward pass: share * (count * y_t - sum of y over |u - t| <= reach).
template <class V>
struct Window {
  int reach;
  V share;  // what the bands that end or begin here contribute, g_s - g_{s+1}
  V sum;    // S_reach(t)
};

template <class V, class Rows>
TSAE_INLINE void open_window(const Rows& y, int n, Window<V>& window) {
  window.sum = V{};
  for (int t = 0; t < smaller(window.reach, n); ++t) window.sum = window.sum + y(t);
}

// One window's part of the pull at t, where the features are y_t. To be called for t = 0, 1, ...
template <class V, class Rows>
TSAE_INLINE V slide_window(const Rows& y, const V& y_t, int t, int n, Window<V>& window) {
  using E = element_of<V>;
  V sum = window.sum;
  if (t + window.reach < n) sum = sum + y(t + window.reach);
  if (t - window.reach - 1 >= 0) sum = sum - y(t - window.reach - 1);
  window.sum = sum;
  return window.share * (y_t * E(window_count(t, n, window.reach)) - sum);
}

// sum_s g_s (deg_t y_t - N_t): half the gradient of the loss with respect to y_t. To be called for t = 0, 1, ...
template <class V, class Rows>
TSAE_INLINE V window_pull(const Rows& y, int t, int n, Window<V>* windows, int number_of_windows) {
  V pull{};
  for (int r = 0; r < number_of_windows; ++r) pull = pull + slide_window(y, y(t), t, n, windows[r]);
  return pull;
}

}  // namespace TSAE_TARGET
}  // namespace tsae
