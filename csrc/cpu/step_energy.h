// The weighted energy of steps along T, sum of weights[b, t] (h[b, t+1, j] - h[b, t, j])^2 (TC-SAE's window loss), and
// its gradient, for a tile. docs/mathematics.md, section 6.
#pragma once

#include "tiles.h"

namespace tsae {
namespace TSAE_TARGET {

// In long sequences, prefetches later rows of this tile, as a row would be evicted before the next tile reads it.
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
      if (weights[t - 1] != 0) part = part + step * step * weights[t - 1];  // a pair of zero weight may be NaN
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

}  // namespace TSAE_TARGET
}  // namespace tsae
