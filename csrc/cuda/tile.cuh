// Where the features are: a warp's tile in shared memory, or columns of global memory; and the runs along T.
#pragma once

#include "pair.cuh"

namespace tsae::cuda {

// The two features of this thread, j and j + 1, of sequence b. count: how many of them there are.
struct Place {
  int64_t b, first, j;  // first: of the whole block
  int count;
};
__device__ __forceinline__ Place place_of(int64_t k, int width) {
  const int64_t blocks = (k + width - 1) / width;  // of one sequence, neighbours in the grid: they read the same rows
  Place at;
  at.b = blockIdx.x / blocks;
  at.first = (blockIdx.x % blocks) * width;
  at.j = at.first + 2 * int(threadIdx.x);
  at.count = at.j + 2 <= k ? 2 : at.j < k ? 1 : 0;
  return at;
}

// This thread's features at every t, in shared or global memory. Features that are not there read as 0.
template <class T>
struct Column {
  const T* at;
  int64_t time;
  int64_t feature;
  bool paired;
  int count;

  __device__ __forceinline__ Column(const Source& source, const Place& place)
      : at(reinterpret_cast<const T*>(source.x.data) + place.b * source.x.batch + place.j * source.x.feature),
        time(source.x.time), feature(source.x.feature), paired(source.paired && place.count == 2), count(place.count) {}
  __device__ __forceinline__ Column(const Stored<T>* tile_column)
      : at(reinterpret_cast<const T*>(tile_column)), time(kTile), feature(1), paired(true), count(2) {}

  __device__ __forceinline__ Stored<T> stored(int t) const {
    const T* from = at + t * time;
    if (paired) return *reinterpret_cast<const Stored<T>*>(from);
    return stored_from(count > 0 ? from[0] : T{}, count > 1 ? from[feature] : T{});
  }
  __device__ __forceinline__ Pair<compute_of<T>> operator()(int t) const { return widen<T>(stored(t)); }
  __device__ __forceinline__ Column from(int t) const {
    Column later = *this;
    later.at += t * time;
    return later;
  }
};

// The same in this warp's tile, for the tuned kernels: the compiler sees that it is shared memory.
template <class T>
struct TileColumn {
  Stored<T>* at;
  __device__ __forceinline__ Pair<compute_of<T>> operator()(int t) const { return widen<T>(at[t * kLanes]); }
  __device__ __forceinline__ TileColumn from(int t) const { return {at + t * kLanes}; }
};

template <class T>
__device__ __forceinline__ Stored<T>* tile() {
  return reinterpret_cast<Stored<T>*>(shared_memory());
}
template <class T>
TSAE_INLINE constexpr int64_t tile_bytes(int64_t T_) {
  return T_ * kTile * int64_t(sizeof(T));
}

// Blocks of one warp with tiles of 128 rows that one multiprocessor with 227 KB of shared memory holds at a time: the
// registers of the tuned kernels are limited so that it does.
template <class T>
constexpr int kResident = sizeof(T) == 2 ? 13 : 6;

// Begins to fill the tile. It is there after await_copies and a barrier.
template <class T>
__device__ __forceinline__ void fill_tile(const Source& source, int T_, int64_t k, const Place& place) {
  if (source.whole) {
    constexpr int row_bytes = kTile * sizeof(T), pieces = row_bytes / 16;
    static_assert(pieces <= kLanes);
    const int piece = threadIdx.x % pieces;
    const int64_t missing = (place.first + kTile - k) * int64_t(sizeof(T));  // at the end of the row, or negative
    const int64_t bytes = row_bytes - piece * 16 - (missing > 0 ? missing : 0);
    const int present = bytes >= 16 ? 16 : bytes > 0 ? int(bytes) : 0;
    const int64_t stride = source.x.time * int64_t(sizeof(T));
    const char* from = source.x.data + (place.b * source.x.batch + place.first) * int64_t(sizeof(T));
    if (present > 0) from += piece * 16;
    unsigned char* to = shared_memory() + piece * 16;
    #pragma unroll 4
    for (int t = threadIdx.x / pieces; t < T_; t += kLanes / pieces) copy_async(to + t * row_bytes, from + t * stride, present);
  } else {
    const Column<T> column(source, place);
    Stored<T>* to = tile<T>() + threadIdx.x;
    #pragma unroll 8
    for (int t = 0; t < T_; ++t) to[t * kLanes] = column.stored(t);
  }
}

// A contiguous [B, T, k] result.
template <class T>
struct Output {
  T* at;
  int64_t time;
  bool paired;
  int count;

  __device__ __forceinline__ Output(void* data, int T_, int64_t k, bool paired, const Place& place)
      : at(static_cast<T*>(data) + place.b * T_ * k + place.j), time(k), paired(paired && place.count == 2),
        count(place.count) {}
  __device__ __forceinline__ void operator()(int t, const Stored<T>& x) const {
    T* const to = at + t * time;
    if (paired) {
      *reinterpret_cast<Stored<T>*>(to) = x;
    } else {
      if (count > 0) to[0] = first_of<T>(x);
      if (count > 1) to[1] = second_of<T>(x);
    }
  }
};

// Two numbers of compute type, `index` of the first; `missing` for those that are not there.
template <class E>
__device__ __forceinline__ Pair<E> load_numbers(const void* from, int64_t index, int count, E missing = 0) {
  const E* at = static_cast<const E*>(from) + index;
  return {count > 0 ? at[0] : missing, count > 1 ? at[1] : missing};
}
template <class E>
__device__ __forceinline__ void store_numbers(void* to, int64_t index, const Pair<E>& x, bool paired, int count) {
  E* at = static_cast<E*>(to) + index;
  if (paired && count == 2) {
    *reinterpret_cast<Stored<E>*>(at) = {x.a, x.b};
  } else {
    if (count > 0) at[0] = x.a;
    if (count > 1) at[1] = x.b;
  }
}

// A maximal stretch [begin, end) of one sequence: a segment, or positions that are excluded.
struct Run {
  int begin, end;
  bool excluded;
};
// ends: of this sequence, written by find_runs where a run begins: its end, negative if it is excluded.
__device__ __forceinline__ Run run_at(const int* ends, int begin, int T_) {
  if (!ends) return {0, T_, false};
  const int end = ends[begin];
  return {begin, end < 0 ? -end : end, end < 0};
}

// The level around which a run is centred: the mean of every eighth position (of all, up to 16), times kShrink. It is off
// the mean by at most sqrt(7) standard deviations whatever the features are (mathematics, section 4), so that what centring
// is for is kept: no product is much larger than the result.
template <class Rows>
__device__ __forceinline__ auto shrunk_level(const Rows& x, int n) {
  using V = decltype(x(0));
  using E = element_of<V>;
  const int step = smaller(larger(n / 16, 1), 8);
  V sum{};
  #pragma unroll 4
  for (int t = 0; t < n; t += step) sum = fused(x(t), kShrink<E>, sum);
  return sum * (E(1) / E((n - 1) / step + 1));
}

// Rows of the recurrence: x - level, or the same times kShrink.
template <class Rows, class V>
struct Centred {
  Rows x;
  V level;
  __device__ __forceinline__ V operator()(int t) const { return x(t) - level; }
};
template <class Rows, class V>
struct Shrunk {
  Rows x;
  V level;  // times kShrink
  __device__ __forceinline__ V operator()(int t) const {
    return fused(x(t), kShrink<element_of<V>>, V{} - level);
  }
};

// ---- activations --------------------------------------------------------------------------------------------------

// Phi(z) and phi(z), distribution and density of the standard normal: gelu(z) = z Phi(z), gelu'(z) = Phi(z) + z phi(z).
struct Normal {
  float distribution, density;
};
__device__ __forceinline__ Normal normal(float z) {
  constexpr float P[] = TSAE_TAIL;
  const float magnitude = fabsf(z);
  const float exponential = fast_exponential(z * z * -0.5f);
  const float r = fast_reciprocal(1.f + TSAE_TAIL_SCALE * magnitude);
  float tail = P[8];
  #pragma unroll 8
  for (int d = 7; d >= 0; --d) tail = fused(tail, r, P[d]);
  tail = tail * r * exponential;
  return {z > 0 ? 1.f - tail : tail, exponential * 0.398942280f};
}
struct Normal64 {
  double distribution, density;
};
__device__ __forceinline__ Normal64 normal(double z) {
  return {0.5 * (1 + erf(z * 0.70710678118654752440)), 0.39894228040143267794 * exp(-0.5 * z * z)};
}

// gelu(z), rounded as it is stored, and gelu'(z).
template <class T, class E = compute_of<T>>
struct Gelu {
  Stored<T> value;
  Pair<E> slope;
  __device__ __forceinline__ explicit Gelu(const Pair<E>& z) {
    const auto a = normal(z.a), b = normal(z.b);
    value = narrow<T>({z.a * a.distribution, z.b * b.distribution});
    slope = {a.distribution + z.a * a.density, b.distribution + z.b * b.density};
  }
};

}  // namespace tsae::cuda
