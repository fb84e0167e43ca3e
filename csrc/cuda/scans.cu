// Walks along T: the cheapest path of two states, the leaky recurrence, and its gradient. A thread walks two adjacent
// features of one sequence, so a warp's loads and stores are adjacent. docs/mathematics.md, section 8.
#include "../shared/two_state.h"
#include "tile.cuh"

namespace tsae::cuda {
namespace {

// Where a position is in its segment. ids: of this sequence, or null if it is one segment.
struct Bounds {
  bool excluded, begins, ends;
};
__device__ __forceinline__ Bounds bounds_at(const int64_t* ids, int t, int T_) {
  if (!ids) return {false, t == 0, t + 1 == T_};
  const int64_t id = ids[t];
  return {id < 0, t == 0 || ids[t - 1] != id, t + 1 == T_ || ids[t + 1] != id};
}
__device__ __forceinline__ const int64_t* ids_of(const int64_t* ids, int T_, const Place& place) {
  return ids ? ids + place.b * T_ : nullptr;
}

// This thread's two numbers in the rows of a contiguous [B, rows, k] tensor.
template <class X>
struct Rows {
  struct alignas(2 * sizeof(X)) Two {
    X a, b;
  };
  X* at;
  int64_t k;
  bool paired;
  int count;

  __device__ __forceinline__ Rows(void* data, int64_t rows, int64_t k, bool paired, const Place& place)
      : at(static_cast<X*>(data) + place.b * rows * k + place.j), k(k), paired(paired && place.count == 2),
        count(place.count) {}
  __device__ __forceinline__ void store(int row, X a, X b) const {
    X* const to = at + row * k;
    if (paired) {
      *reinterpret_cast<Two*>(to) = {a, b};
    } else {
      to[0] = a;
      if (count > 1) to[1] = b;
    }
  }
  __device__ __forceinline__ Two load(int row) const {
    const X* const from = at + row * k;
    if (paired) return *reinterpret_cast<const Two*>(from);
    return {from[0], count > 1 ? from[1] : X(0)};
  }
};

// Two bits of a word: whether the best path to off, and to on, at the next position is on at this one. At a segment's end
// both are whether the path is on.
__device__ __forceinline__ uint32_t path_bits(bool to_off, bool to_on) { return uint32_t(to_off) | uint32_t(to_on) << 1; }

template <class T>
__global__ void __launch_bounds__(kStepThreads) path_kernel(const __grid_constant__ Path f) {
  using E = compute_of<T>;
  using V = Pair<E>;
  const Place place = place_of(f.k, 2 * kStepThreads);
  if (place.count == 0) return;
  const Column<T> z(f.z, place);
  const Rows<uint32_t> decisions(f.decisions, f.words, f.k, f.paired, place);
  const PathLevels<V> levels =
      path_levels<V>([&](int i) { return load_numbers<E>(f.levels, i * f.k + place.j, place.count); });
  const int64_t* ids = ids_of(f.ids, f.T, place);
  const V infinity = splat(E(__builtin_inf()));
  V excess{};
  for (int word = 0; word < f.words; ++word) {
    const int begin = word * kPathPositions, end = smaller(begin + kPathPositions, f.T);
    uint32_t a = 0, b = 0;
#pragma unroll 8
    for (int t = begin; t < end; ++t) {
      const Bounds at = bounds_at(ids, t, f.T);
      excess = (at.begins ? levels.start : next_excess(levels, excess)) + cost_of_on(z(t), infinity);
      const Mask to_off = less(excess, at.ends ? V{} : levels.stay_off);
      const Mask to_on = less(excess, at.ends ? V{} : levels.stay_on);
      if (at.excluded) continue;  // what it computed is not read: the next segment starts anew
      a |= path_bits(to_off.a, to_on.a) << 2 * (t - begin);
      b |= path_bits(to_off.b, to_on.b) << 2 * (t - begin);
    }
    decisions.store(word, a, b);
  }
  const Rows<uint8_t> on(f.on, f.T, f.k, f.paired, place);
  uint32_t a = 0, b = 0;  // the states at the position after
  for (int word = f.words - 1; word >= 0; --word) {
    const int begin = word * kPathPositions, end = smaller(begin + kPathPositions, f.T);
    const auto bits = decisions.load(word);
#pragma unroll 8
    for (int t = end - 1; t >= begin; --t) {
      a = bits.a >> (2 * (t - begin) + a) & 1;
      b = bits.b >> (2 * (t - begin) + b) & 1;
      on.store(t, uint8_t(a), uint8_t(b));
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kStepThreads) leaky_kernel(const __grid_constant__ Leaky f) {
  using E = compute_of<T>;
  using V = Pair<E>;
  const Place place = place_of(f.k, 2 * kStepThreads);
  if (place.count == 0) return;
  const Column<T> a(f.a, place);
  const Output<T> h(f.h, f.T, f.k, f.paired, place);
  const V decay = load_numbers<E>(f.decay, place.j, place.count), rest = splat(E(1)) - decay;
  const int64_t* ids = ids_of(f.ids, f.T, place);
  V state{};
#pragma unroll 8
  for (int t = 0; t < f.T; ++t) {
    const Bounds at = bounds_at(ids, t, f.T);
    const V now = fused(decay, at.begins ? V{} : state, rest * a(t));
    state = at.excluded ? V{} : now;
    h(t, narrow<T>(state));
  }
}

template <class T>
__global__ void __launch_bounds__(kStepThreads) leaky_backward_kernel(const __grid_constant__ LeakyBackward f) {
  using E = compute_of<T>;
  using V = Pair<E>;
  const Place place = place_of(f.k, 2 * kStepThreads);
  if (place.count == 0) return;
  const bool with_decay = f.a.x.data != nullptr;
  const Column<T> grad_h(f.grad_h, place), a(with_decay ? f.a : f.grad_h, place), h(with_decay ? f.h : f.grad_h, place);
  const Output<T> grad_a(f.grad_a, f.T, f.k, f.paired, place);
  const V decay = load_numbers<E>(f.decay, place.j, place.count), rest = splat(E(1)) - decay;
  const int64_t* ids = ids_of(f.ids, f.T, place);
  V g{}, total{};
  for (int block = (f.T - 1) / kBlock; block >= 0; --block) {
    V part{};
#pragma unroll 2
    for (int t = smaller((block + 1) * kBlock, f.T) - 1; t >= block * kBlock; --t) {
      const Bounds at = bounds_at(ids, t, f.T);
      const V now = fused(decay, at.ends ? V{} : g, grad_h(t));
      g = at.excluded ? V{} : now;
      if (with_decay && !at.excluded) part = fused(g, (at.begins ? V{} : h(t - 1)) - a(t), part);
      grad_a(t, narrow<T>(rest * g));
    }
    total = total + part;
  }
  store_numbers<E>(f.grad_decay, place.b * f.k + place.j, total, f.paired, place.count);
}

// Launches `kernel` for all features.
template <class Argument>
const char* launch_all(void (*kernel)(Argument), const Argument& f, void* stream) {
  return launch(kernel, f.B * blocks_of_steps(f.k), kStepThreads, 0, stream, f);
}

}  // namespace

const char* viterbi_path(const Path& f, void* stream) {
  return with_dtype(f.dtype, [&](auto element) { return launch_all(path_kernel<decltype(element)>, f, stream); });
}
const char* leaky_recurrence(const Leaky& f, void* stream) {
  return with_dtype(f.dtype, [&](auto element) { return launch_all(leaky_kernel<decltype(element)>, f, stream); });
}
const char* leaky_recurrence_backward(const LeakyBackward& f, void* stream) {
  return with_dtype(f.dtype, [&](auto element) {
    return launch_all(leaky_backward_kernel<decltype(element)>, f, stream);
  });
}

}  // namespace tsae::cuda
