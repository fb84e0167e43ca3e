// Walks along T for one tile: the cheapest on/off path, the leaky recurrence and its gradient. docs/mathematics.md,
// section 8.
#pragma once

#include "../shared/two_state.h"
#include "tiles.h"

namespace tsae {
namespace TSAE_TARGET {

// In long sequences, prefetches this tile's rows that follow in the walk, as a row would be evicted before the next tile
// reads it.
TSAE_INLINE Tile scan_tile(int64_t T, int64_t k, int64_t width, int64_t b, int64_t tile, int64_t row) {
  return Tile(k, width, b, tile, T <= kRowsKept ? width : 16 * row);
}

// Two bits a position: whether the best path to off, and to on, at the next position is on at this one. A word holds
// those of kPathsPerWord<E> positions.
template <class E>
constexpr int kPathsPerWord = 4 * sizeof(E);

// The lowest bit of every lane, as `count` bytes.
template <class E>
TSAE_INLINE void store_bytes(uint8_t* to, const Mask<E>& bits, int count) {
  constexpr int lanes = Pack<E>::lanes;
  typedef uint8_t Bytes __attribute__((vector_size(lanes)));
  Bytes bytes[kVectors];
  TSAE_EACH_VECTOR bytes[i] = __builtin_convertvector(bits.v[i], Bytes);
  if (__builtin_expect(count == Pack<E>::width, 1)) __builtin_memcpy(to, bytes, sizeof bytes);
  else __builtin_memcpy(to, bytes, count);
}

template <class T, class E = compute_of<T>>
void path_tile(const Path& f, Runs runs, int64_t b, int64_t tile, void* scratch) {
  using V = Pack<E>;
  constexpr int positions = kPathsPerWord<E>;
  const Tile at = scan_tile(f.T, f.k, V::width, b, tile, f.z.time);
  const Reader<T> z(f.z, at);
  const PathLevels<V> levels =
      path_levels<V>([&](int i) { return load_numbers<E>(f.levels, i * f.k + at.j, at.count); });
  const V infinity = splat(E(__builtin_inf()));
  Mask<E>* words = static_cast<Mask<E>*>(scratch);
  Mask<E> word{};
  for (int64_t r = 0; r < runs.count; ++r) {
    const Run& run = runs.first[r];
    V excess{};
    for (int t = run.begin; t < run.end; ++t) {
      const int place = t % positions;
      if (!run.excluded) {
        excess = (t == run.begin ? levels.start : next_excess(levels, excess)) + cost_of_on(z(t), infinity);
        const bool last = t + 1 == run.end;
        const Mask<E> to_off = less(excess, last ? V{} : levels.stay_off);
        const Mask<E> to_on = less(excess, last ? V{} : levels.stay_on);
        TSAE_EACH_VECTOR word.v[i] |= ((to_off.v[i] & 1) | (to_on.v[i] & 2)) << 2 * place;
      }
      if (place + 1 == positions || t + 1 == f.T) {
        words[t / positions] = word;
        word = Mask<E>{};
      }
    }
  }
  Mask<E> on{};
  uint8_t* to = f.on + (b * f.T + f.T - 1) * f.k + at.j;
  for (int64_t t = f.T - 1; t >= 0; --t, to -= f.k) {
    Mask<E> bit;
    TSAE_EACH_VECTOR {
      const auto bits = words[t / positions].v[i] >> 2 * int(t % positions);
      bit.v[i] = (((bits >> 1) & on.v[i]) | (bits & ~on.v[i])) & 1;
      on.v[i] = -bit.v[i];
    }
    store_bytes<E>(to, bit, at.count);
  }
}

template <class T, class E = compute_of<T>>
void leaky_tile(const Leaky& f, Runs runs, int64_t b, int64_t tile) {
  using V = Pack<E>;
  const Tile at = scan_tile(f.T, f.k, V::width, b, tile, f.a.time);
  const Reader<T> a(f.a, at);
  const Writer<T> h(f.h, f.T, f.k, f.stream, at);
  const V decay = load_numbers<E>(f.decay, at.j, at.count), rest = splat(E(1)) - decay;
  for (int64_t r = 0; r < runs.count; ++r) {
    const Run& run = runs.first[r];
    V state{};
    for (int t = run.begin; t < run.end; ++t) {
      if (!run.excluded) state = decay * state + rest * a(t);
      h(t, narrow<T>(state));
    }
  }
}

template <class T, class E = compute_of<T>>
void leaky_backward_tile(const LeakyBackward& f, Runs runs, int64_t b, int64_t tile) {
  using V = Pack<E>;
  const Tile at = scan_tile(f.T, f.k, V::width, b, tile, -f.grad_h.time);
  const Reader<T> grad_h(f.grad_h, at);
  const Writer<T> grad_a(f.grad_a, f.T, f.k, f.stream, at);
  const V decay = load_numbers<E>(f.decay, at.j, at.count), rest = splat(E(1)) - decay;
  const bool with_decay = f.a.data != nullptr;
  const Reader<T> a(with_decay ? f.a : f.grad_h, at), h(with_decay ? f.h : f.grad_h, at);
  V total{};
  for (int64_t r = runs.count - 1; r >= 0; --r) {
    const Run& run = runs.first[r];
    V g{}, part{};
    for (int t = run.end - 1; t >= run.begin; --t) {
      if (!run.excluded) {
        g = grad_h(t) + decay * g;
        if (with_decay) {
          const V before = t > run.begin ? h(t - 1) : V{};
          part = part + g * (before - a(t));
          if ((run.end - t) % kBlock == 0 || t == run.begin) total = total + part, part = V{};
        }
      }
      grad_a(t, narrow<T>(rest * g));
    }
  }
  store_numbers<E>(f.grad_decay, b * f.k + at.j, total, at.count);
}

}  // namespace TSAE_TARGET
}  // namespace tsae
