// A ring of rows in shared memory for a walk along T in steps of eight rows that begin anywhere: any eight successive rows
// are adjacent. The tuned backward kernel finds every row at a constant offset from one of a few addresses.
#pragma once

#include "tile.cuh"

namespace tsae::cuda {

constexpr int kBatch = 8;  // rows that are copied, and processed, together

__device__ __forceinline__ int batch_of(int t) { return int(unsigned(t) / kBatch); }

// Row t is in slot t mod kSlots. The first kBatch slots are there twice, at both ends.
template <class T, int kSlots>
struct MirroredRing {
  static_assert((kSlots & (kSlots - 1)) == 0);
  static constexpr int kRowBytes = kTile * sizeof(T);
  static constexpr int kBytes = (kSlots + kBatch) * kRowBytes;
  Stored<T>* lane;  // this lane's features in slot 0

  __device__ __forceinline__ explicit MirroredRing(unsigned char* at)
      : lane(reinterpret_cast<Stored<T>*>(at) + threadIdx.x) {}
  __device__ __forceinline__ Stored<T>* row(int t) const { return lane + (t & (kSlots - 1)) * kLanes; }
  __device__ __forceinline__ void clear() const {
#pragma unroll 1
    for (int i = 0; i < kSlots + kBatch; ++i) lane[i * kLanes] = Stored<T>{};
  }
};

// Copies batches of rows, in order, from one source into a ring. They arrive with the copies' group and a barrier.
template <class T, int kSlots>
class RowFeed {
  using Ring = MirroredRing<T, kSlots>;
  static constexpr int kPieces = Ring::kRowBytes / 16;  // of a row
  static constexpr int kTogether = kLanes / kPieces;    // rows that the warp copies at once

  const Source& source_;
  int T_;
  const char* next_;   // this lane's 16 bytes of the next rows
  unsigned char* to_;  // and their place in slot 0
  Stored<T>* lane_;

 public:
  __device__ __forceinline__ RowFeed(const Source& source, const Ring& ring, int T_, int64_t k, const Place& place)
      : source_(source), T_(T_), lane_(ring.lane) {
    int piece = threadIdx.x % kPieces;
    const int row = threadIdx.x / kPieces;
    to_ = reinterpret_cast<unsigned char*>(ring.lane - threadIdx.x) + row * Ring::kRowBytes + piece * 16;
    // Pieces of features that do not exist: any other, as their values are not used.
    if (place.first + (piece + 1) * int(16 / sizeof(T)) > k) piece = 0;
    const int64_t first = place.b * source.x.batch + place.first + row * source.x.time;
    next_ = source.x.data + first * int64_t(sizeof(T)) + piece * 16;
  }

  // Starts copying rows 8 * batch to 8 * batch + 7, which must exist, from an aligned source. Their slots must be free.
  __device__ __forceinline__ void copy_whole(int batch) {
    const int slot = batch * kBatch & (kSlots - 1);
    unsigned char* const to = to_ + slot * Ring::kRowBytes;
    const char* from = next_;
    const int64_t jump = source_.x.time * int64_t(kTogether * sizeof(T));
#pragma unroll
    for (int i = 0; i < kBatch; i += kTogether, from += jump) copy_async(to + i * Ring::kRowBytes, from);
    if (slot == 0) {
      const char* again = next_;
#pragma unroll
      for (int i = 0; i < kBatch; i += kTogether, again += jump) {
        copy_async(to + (kSlots + i) * Ring::kRowBytes, again);
      }
    }
    next_ = from;
  }

  // The same for rows of which some may not exist, and any source.
  __device__ __forceinline__ void copy(int batch, const Place& place) {
    const int first = batch * kBatch, slot = first & (kSlots - 1), count = smaller(kBatch, T_ - first);
    if (source_.vectorized) {
      const int own_row = threadIdx.x / kPieces;
#pragma unroll 1
      for (int i = 0; i < kBatch; i += kTogether, next_ += source_.x.time * int64_t(kTogether * sizeof(T))) {
        unsigned char* const to = to_ + (slot + i) * Ring::kRowBytes;
        if (own_row + i >= count) continue;
        copy_async(to, next_);
        if (slot == 0) copy_async(to + kSlots * Ring::kRowBytes, next_);
      }
    } else {
      const Column<T> column(source_, place);
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        const Stored<T> x = column.stored(first + i);
        lane_[(slot + i) * kLanes] = x;
        if (slot == 0) lane_[(kSlots + i) * kLanes] = x;
      }
    }
  }
};

}  // namespace tsae::cuda
