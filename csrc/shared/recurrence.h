// The sliding-window recurrences over one segment, for host and device kernels: band sums D (forward pass) and window
// sums (backward pass). Derivations: docs/mathematics.md, sections 2 to 4.
//
// `V` holds adjacent features at one position: a pair on the device, a pack of SIMD vectors on the host. It needs + -
// *, a product with its element type, and the functions `less_equal` and `select`. `Rows` is a callable: y(t) is the
// segment's centred features at t.
//
// Everything is inlined or in the namespace TSAE_TARGET, because the host kernels are compiled once per instruction
// set: a function that the linker merged across them could execute instructions that the processor lacks.
#pragma once

#include "operands.h"

#ifdef __CUDACC__
#define TSAE_INLINE __host__ __device__ __forceinline__
#else
#define TSAE_INLINE inline __attribute__((always_inline))
#endif
#define TSAE_INLINE_LAMBDA __attribute__((always_inline))

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

// A sliding window is summed afresh after this many steps, to stop rounding errors from accumulating.
constexpr int kRefresh = 4 * kBlock;

TSAE_INLINE int smaller(int a, int b) { return a < b ? a : b; }
TSAE_INLINE int larger(int a, int b) { return a > b ? a : b; }

// The number of positions u in a segment of length n with |u - t| <= reach.
TSAE_INLINE int window_count(int t, int n, int reach) { return smaller(t + reach, n - 1) - larger(t - reach, 0) + 1; }

// Terms are scaled by this power of two before they are summed, so that no sum overflows before its result does, even
// for bfloat16 of 3e38. Scaling by a power of two is exact.
template <class E>
constexpr E kSumScale = E(1) / 65536;
template <class E>
constexpr E kInverseSumScale = E(65536);

// Reads rows t, t + 1, ... in turn. `in_turn` and `half_degrees` can be overloaded for rows that have a faster way;
// those of the host are in cpu/ring_buffer.h.
template <class Rows>
struct InTurn {
  const Rows* y;
  int t;
  TSAE_INLINE auto operator()() const { return (*y)(t); }
  TSAE_INLINE void next() { ++t; }
};
template <class Rows>
TSAE_INLINE InTurn<Rows> in_turn(const Rows& y, int t) {
  return {&y, t};
}

// Half the degree of t in the band (first, last), i.e. of the number of positions compared with t, for t in [begin,
// end).
template <class E>
struct HalfDegrees {
  int n, first, last;
  TSAE_INLINE E operator()(int t) const {
    return E(0.5) * E(window_count(t, n, last) - window_count(t, n, first - 1));
  }
};
template <class E, class Rows>
TSAE_INLINE HalfDegrees<E> half_degrees(const Rows&, int, int, int n, int first, int last) {
  return {n, first, last};
}

// Sum of (y_t - y_{t - offset})^2 over offsets first to first + count - 1 and t in [begin, end).
template <int count, class V, class Rows>
TSAE_INLINE V pairs_block(const Rows& y, int begin, int end, int first) {
  V energy{};
  int t = begin;
  const auto step_squared = [](const V& now, const V& before) {
    const V step = now - before;
    return step * step;
  };
  for (; t < smaller(end, first + count - 1); ++t) {
    for (int offset = first; offset <= smaller(first + count - 1, t); ++offset)
      energy = energy + step_squared(y(t), y(t - offset));
  }
  if (t >= end) return energy;
  auto now = in_turn(y, t);
  decltype(now) before[count];
  for (int i = 0; i < count; ++i) before[i] = in_turn(y, t - first - i);
  for (; t < end; ++t) {
    const V y_t = now();
    V squares{};
    for (int i = 0; i < count; ++i) squares = squares + step_squared(y_t, before[i]());
    energy = energy + squares;
    now.next();
    for (int i = 0; i < count; ++i) before[i].next();
  }
  return energy;
}

// The terms t in [begin, end) of D of the band (first, last), over a segment of n positions. Call for a segment's
// blocks in order, starting with `past` = 0; all blocks but the last have kBlock positions.
template <class V, class Rows>
TSAE_INLINE V band_block(const Rows& y, int begin, int end, int n, int first, int last, V& past) {
  using E = element_of<V>;
  // Up to four offsets are summed pair by pair, which is as fast as the window, and accurate even for a feature that
  // changes so slowly that the differences are far smaller than the feature (docs/mathematics.md, section 4).
  switch (last - first) {
    case 0: return pairs_block<1, V>(y, begin, end, first);
    case 1: return pairs_block<2, V>(y, begin, end, first);
    case 2: return pairs_block<3, V>(y, begin, end, first);
    case 3: return pairs_block<4, V>(y, begin, end, first);
  }
  // `past` is F_t, the sum of y over [t - last, t - first].
  if (begin > 0 && begin % kRefresh == 0) {
    past = V{};
    for (int u = larger(begin - 1 - last, 0); u <= begin - 1 - first; ++u) past = past + y(u);
  }
  const auto half_degree = half_degrees<E>(y, begin, end, n, first, last);
  auto now = in_turn(y, begin), enters = in_turn(y, begin - first), leaves = in_turn(y, begin - last - 1);
  V sum = past, energy{};
  for (int t = begin; t < end; ++t) {
    if (t >= first) sum = sum + enters();
    if (t > last) sum = sum - leaves();
    const V y_t = now();
    energy = energy + y_t * (sum - y_t * half_degree(t));
    now.next(), enters.next(), leaves.next();
  }
  past = sum;
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

// One window of the backward pass. Its term is weight * (count * y_t - sum of y over |u - t| <= reach).
template <class V>
struct Window {
  int reach;
  V weight;  // g_s - g_{s+1}, from the bands that end and begin here
  V sum;    // S_reach(t)
};

template <class V, class Rows>
TSAE_INLINE void open_window(const Rows& y, int n, Window<V>& window) {
  window.sum = V{};
  for (int t = 0; t < smaller(window.reach, n); ++t) window.sum = window.sum + y(t);
}

// The window's term at t, and the window moved to t. y_t: the features at t; entering: row t + reach; leaving: row
// t - reach - 1; count: the number of positions in the window. Call for t = 0, 1, ...
template <class V, class InTurn>
TSAE_INLINE V slide_window(const V& y_t, int t, int n, const InTurn& entering, const InTurn& leaving,
                           element_of<V> count, Window<V>& window) {
  V sum = window.sum;
  if (t + window.reach < n) sum = sum + entering();
  if (t - window.reach - 1 >= 0) sum = sum - leaving();
  window.sum = sum;
  return window.weight * (y_t * count - sum);
}
template <class V, class Rows>
TSAE_INLINE V slide_window(const Rows& y, const V& y_t, int t, int n, Window<V>& window) {
  return slide_window(y_t, t, n, in_turn(y, t + window.reach), in_turn(y, t - window.reach - 1),
                      element_of<V>(window_count(t, n, window.reach)), window);
}

}  // namespace TSAE_TARGET
}  // namespace tsae
