// Access to features: a warp's tile in shared memory, columns of global memory, segments along T, and centred rows.
#pragma once

#include "feature_pair.cuh"

namespace tsae::cuda {

// This thread's features, j and j + 1 of sequence b. count: how many of the two exist.
struct Place {
  int64_t b, first, j;  // first: the block's first feature
  int count;
};
__device__ __forceinline__ Place place_of(int64_t k, int width) {
  // Of one sequence; adjacent in the grid, as they read the same rows. `launch` limits them to 32 bits.
  const unsigned blocks = unsigned((k + width - 1) / width), b = blockIdx.x / blocks;
  Place at;
  at.b = b;
  at.first = int64_t(blockIdx.x - b * blocks) * width;
  at.j = at.first + 2 * int(threadIdx.x);
  at.count = at.j + 2 <= k ? 2 : at.j < k ? 1 : 0;
  return at;
}

// This thread's features at every t, in shared or global memory. Features that do not exist read as 0.
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
  // If both features exist and are adjacent.
  __device__ __forceinline__ Stored<T> pair(int t) const { return *reinterpret_cast<const Stored<T>*>(at + t * time); }
  __device__ __forceinline__ Pair<compute_of<T>> operator()(int t) const { return widen<T>(stored(t)); }
  __device__ __forceinline__ Column from(int t) const {
    Column later = *this;
    later.at += t * time;
    return later;
  }
};

// A column of this warp's tile, for the tuned kernels: the compiler knows that it is in shared memory.
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

// Resident blocks (one warp, 128 rows) that fit on a multiprocessor with 227 KB of shared memory. The tuned kernels'
// register count is limited to allow as many.
template <class T>
constexpr int kResident = sizeof(T) == 2 ? 13 : 6;

// Starts copying the tile into shared memory. Completes with await_copies and a barrier.
template <class T>
__device__ __forceinline__ void fill_tile(const Source& source, int T_, int64_t k, const Place& place) {
  if (source.vectorized) {
    constexpr int row_bytes = kTile * sizeof(T), pieces = row_bytes / 16;
    static_assert(pieces <= kLanes);
    const int piece = threadIdx.x % pieces;
    const int64_t missing = (place.first + kTile - k) * int64_t(sizeof(T));  // past the end of the row; may be negative
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

// Two numbers of compute type, starting at `index`; `missing` for those that do not exist.
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

// A maximal run [begin, end) of equal ids in one sequence: a segment, or excluded positions.
struct Run {
  int begin, end;
  bool excluded;
};
// ends: of this sequence, from find_segment_ends. Where a run begins: its end, negative if it is excluded.
__device__ __forceinline__ Run run_at(const int* ends, int begin, int T_) {
  if (!ends) return {0, T_, false};
  const int end = ends[begin];
  return {begin, end < 0 ? -end : end, end < 0};
}

// The value to subtract from a segment's features, times kSumScale: the mean of every eighth position (of all, up to 16
// positions). It differs from the mean by at most sqrt(7) standard deviations (docs/mathematics.md, section 4), which
// is enough to keep every product from being much larger than the result.
template <class Rows>
__device__ __forceinline__ auto scaled_centre_of(const Rows& x, int n) {
  using V = decltype(x(0));
  using E = element_of<V>;
  const int step = smaller(larger(n / 16, 1), 8);
  V sum{};
#pragma unroll 4
  for (int t = 0; t < n; t += step) sum = fused(x(t), kSumScale<E>, sum);
  return sum * (E(1) / E((n - 1) / step + 1));
}

// The mean of the first rows, at least one for every eight up to 128 positions, times kSumScale: as good a centre for a
// walk that has not seen the rest (docs/mathematics.md, section 4).
template <class Rows>
__device__ __forceinline__ auto scaled_centre_of_first(const Rows& x, int n) {
  using V = decltype(x(0));
  using E = element_of<V>;
  const int count = smaller(n, 16);
  V sum{};
#pragma unroll 4
  for (int t = 0; t < count; ++t) sum = fused(x(t), kSumScale<E>, sum);
  return sum * (E(1) / E(count));
}

// `Rows` of recurrence.h: x - centre, or the same times kSumScale.
template <class Rows, class V>
struct Centred {
  Rows x;
  V centre;
  __device__ __forceinline__ V operator()(int t) const { return x(t) - centre; }
};
template <class Rows, class V>
struct ScaledCentred {
  Rows x;
  V centre;  // times kSumScale
  __device__ __forceinline__ V operator()(int t) const {
    return fused(x(t), kSumScale<element_of<V>>, V{} - centre);
  }
};

}  // namespace tsae::cuda
