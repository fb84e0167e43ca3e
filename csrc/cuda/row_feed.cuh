// Rows of a warp's 64 features, copied ahead of the walk along T into a ring in shared memory: as many bytes per warp
// at any T, and the tuned kernels find every row at a constant offset from one of a few addresses.
#pragma once

#include "tile.cuh"

namespace tsae::cuda {

constexpr int kBatch = 8;  // rows that are copied, and processed, together

// Row t is in slot t mod kRows. The first kBatch rows are there twice, at both ends, so that any kBatch successive rows
// are adjacent.
template <class T, int kRows>
struct RowRing {
  static_assert((kRows & (kRows - 1)) == 0);
  static constexpr int64_t kBytes = tile_bytes<T>(kRows + kBatch);
  Stored<T>* lane;  // this lane's features in slot 0

  __device__ __forceinline__ explicit RowRing(unsigned char* at) : lane(reinterpret_cast<Stored<T>*>(at) + threadIdx.x) {}
  __device__ __forceinline__ Stored<T>* row(int t) const { return lane + (t & (kRows - 1)) * kLanes; }
  __device__ __forceinline__ void clear() const {
    for (int i = 0; i < kRows + kBatch; ++i) lane[i * kLanes] = Stored<T>{};
  }
};

// Copies batches of rows, in order, from one source into a ring. They arrive with the copies' group and a barrier.
// Lanes without features should clear their column: it is not always written.
template <class T, int kRows>
class RowFeed {
  static constexpr int kRowBytes = kTile * sizeof(T), kPieces = kRowBytes / 16;
  static constexpr int kRowsPerCopy = kLanes / kPieces, kCopies = kBatch / kRowsPerCopy;

  const Source& source_;
  int T_;
  int whole_rows_;     // copies before this row are complete and need no checks
  int64_t step_;       // bytes between a lane's copies
  const char* next_;   // of this lane
  unsigned char* to_;  // this lane's 16 bytes in the ring's first rows
  Stored<T>* lane_;
  int present_;        // bytes of this lane's 16 that exist, or -1: not vectorized

 public:
  __device__ __forceinline__ RowFeed(const Source& source, const RowRing<T, kRows>& ring, int T_, int64_t k,
                                     const Place& place)
      : source_(source), T_(source.x.data ? T_ : 0), lane_(ring.lane) {
    const int piece = threadIdx.x % kPieces, row = threadIdx.x / kPieces;
    const int64_t missing = (place.first + kTile - k) * int64_t(sizeof(T));  // past the end of the row; may be negative
    const int64_t bytes = kRowBytes - piece * 16 - (missing > 0 ? missing : 0);
    present_ = !source.vectorized ? -1 : bytes >= 16 ? 16 : bytes > 0 ? int(bytes) : 0;
    whole_rows_ = source.vectorized && missing <= 0 ? this->T_ : 0;
    const int64_t stride = source.x.time * int64_t(sizeof(T));
    step_ = stride * kRowsPerCopy;
    next_ = source.x.data + (place.b * source.x.batch + place.first) * int64_t(sizeof(T)) + row * stride + piece * 16;
    to_ = reinterpret_cast<unsigned char*>(ring.lane - threadIdx.x) + row * kRowBytes + piece * 16;
  }

  // Starts copying rows 8 * batch to 8 * batch + 7. Their slots must be free.
  __device__ __forceinline__ void operator()(int batch, const Place& place) {
    const int first = batch * kBatch, slot = first & (kRows - 1);
    if (first + kBatch <= whole_rows_) {
      unsigned char* const to = to_ + slot * kRowBytes;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) copy_async(to + i * kRowsPerCopy * kRowBytes, next_ + i * step_, 16);
      if (slot == 0) {
#pragma unroll
        for (int i = 0; i < kCopies; ++i)
          copy_async(to + (i * kRowsPerCopy + kRows) * kRowBytes, next_ + i * step_, 16);
      }
      next_ += kCopies * step_;
    } else {
      copy_checked(first, slot, place);
    }
  }

 private:
  // The last rows, the last features of a row, and rows that are not aligned.
  __device__ __forceinline__ void copy_checked(int first, int slot, const Place& place) {
    const int aligned_row = first + int(threadIdx.x) / kPieces;
#pragma unroll 1
    for (int i = 0; i < kCopies; ++i, next_ += step_) {
      unsigned char* const to = to_ + (slot + i * kRowsPerCopy) * kRowBytes;
      if (present_ <= 0 || aligned_row + i * kRowsPerCopy >= T_) continue;
      copy_async(to, next_, present_);
      if (slot == 0) copy_async(to + kRows * kRowBytes, next_, present_);
    }
    const Column<T> column(source_, place);
#pragma unroll 1
    for (int i = 0; present_ < 0 && i < kBatch && first + i < T_; ++i) {
      const Stored<T> x = column.stored(first + i);
      lane_[(slot + i) * kLanes] = x;
      if (slot == 0) lane_[(kRows + i) * kLanes] = x;
    }
  }
};

}  // namespace tsae::cuda
