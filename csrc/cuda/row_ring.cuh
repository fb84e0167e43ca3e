// A ring of a sequence's latest rows in shared memory, filled by asynchronous copies: a warp walks along T in blocks of
// 16 rows while later rows are on their way, so its shared memory and the bytes in flight do not depend on T.
#pragma once

#include "tile.cuh"

namespace tsae::cuda {

constexpr int kRows = 16;     // of a block, and of a stage, the unit of copying
constexpr int kInFlight = 2;  // stages that may be under way while a block is processed

// Rows of a ring whose user reads up to `back` rows behind the block: two stages of the block, which may begin inside a
// stage, and those in flight.
TSAE_INLINE constexpr int ring_rows(int back) { return ((back + kRows - 1) / kRows + 2 + kInFlight) * kRows; }

template <class T>
TSAE_INLINE constexpr int64_t ring_bytes(int rows) {
  return int64_t(rows) * kTile * int64_t(sizeof(T));
}

// One block of rows of this thread's two features, in registers.
template <class T>
using Rows = Stored<T>[kRows];

// Every thread of the warp must call start and await. Row t is in slot t mod capacity.
template <class T>
struct RowRing {
  static constexpr int kPieces = kTile * sizeof(T) / 16;  // of 16 bytes in a row
  static constexpr int kTogether = kLanes / kPieces;      // rows that the warp copies at once
  static_assert(kPieces <= kLanes && kRows % kTogether == 0);

  const Source& source;
  const Place& place;
  int T_, capacity;
  int issued = 0, landed = 0;  // rows that were requested and that have arrived, counted beyond T in full stages
  int slot = 0;                // of the next stage
  int jump;                    // bytes between the rows that this thread copies
  const char* from;            // this thread's piece of the next stage
  unsigned char* to;

  __device__ __forceinline__ RowRing(const Source& source, const Place& place, int T_, int64_t k, int capacity)
      : source(source), place(place), T_(T_), capacity(capacity), jump(0), from(nullptr) {
    if (source.vectorized) {
      // Pieces of features that do not exist: any other, as their values are not used.
      const int pieces = int(k - place.first < kTile ? k - place.first : kTile) * int(sizeof(T)) / 16;
      const int piece = threadIdx.x % kPieces, row = threadIdx.x / kPieces;
      const int64_t at = place.b * source.x.batch + place.first + row * source.x.time;
      from = source.x.data + at * int64_t(sizeof(T)) + (piece < pieces ? piece : 0) * 16;
      jump = kTogether * int(source.x.time) * int(sizeof(T));
    }
    to = shared_memory() + threadIdx.x * 16;
  }

  // Requests the next stage. The slots that it fills must not be read any more. Beyond T it copies nothing.
  __device__ __forceinline__ void issue() {
    if (source.vectorized) {
      unsigned char* const here = to + slot * int(kTile * sizeof(T));
      if (issued + kRows <= T_) {
#pragma unroll
        for (int i = 0; i < kRows; i += kTogether)
          copy_async(here + i * int(kTile * sizeof(T)), from + int64_t(jump) * (i / kTogether));
      } else {
        const int mine = T_ - issued - int(threadIdx.x) / kPieces;  // a row of this thread exists if it is below this
#pragma unroll 1
        for (int i = 0; i < mine && i < kRows; i += kTogether)
          copy_async(here + i * int(kTile * sizeof(T)), from + int64_t(jump) * (i / kTogether));
      }
      from += int64_t(jump) * (kRows / kTogether);
    } else {
      Place mine = place;
      mine.j = opaque(place.j);
      const Column<T> column(source, mine);
      Stored<T>* const here = tile<T>() + slot * kLanes + threadIdx.x;
#pragma unroll 4
      for (int i = 0; i < smaller(kRows, T_ - issued); ++i) here[i * kLanes] = column.stored(issued + i);
    }
    commit_copies();
    issued += kRows;
    slot = after(slot, kRows);
  }

  __device__ __forceinline__ void start() {
#pragma unroll 1
    while (issued < capacity) issue();
  }

  // Waits until the rows before `end` have arrived, at most 16 after `begin`, and gives up the rows before `kept`, at
  // most capacity - 64 before `begin`.
  __device__ __forceinline__ void await(int kept, int end) {
    if (end <= landed) return;
    __syncwarp();  // all lanes have read the rows whose slots are filled next
#pragma unroll 1
    while (issued + kRows <= kept + capacity) issue();
    await_copies_but<kInFlight>();
    __syncwarp();
    landed = issued - kInFlight * kRows;
  }

  __device__ __forceinline__ int after(int slot, int rows) const {
    const int next = slot + rows;
    return next < capacity ? next : next - capacity;
  }
  __device__ __forceinline__ int before(int slot, int rows) const {
    const int earlier = slot - rows;
    return earlier < 0 ? earlier + capacity : earlier;
  }

  // Reads the block of `count` rows that begins in `slot`, in groups of four: rows beyond `count` may be read too, and
  // hold anything. `full`: there are 16.
  template <bool full>
  __device__ __forceinline__ void load(int slot, int count, Rows<T>& rows) const {
    constexpr unsigned row_bytes = kLanes * sizeof(Stored<T>);
    const SharedAddress first = shared_address(tile<T>() + slot * kLanes + threadIdx.x);
    const int beyond = capacity - slot;
    if (beyond >= kRows) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (!full && i % 4 == 0 && i >= count) break;
        rows[i] = load_shared<Stored<T>>(first + i * row_bytes);
      }
    } else {
      const SharedAddress again = first - unsigned(capacity) * row_bytes;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (!full && i % 4 == 0 && i >= count) break;
        rows[i] = load_shared<Stored<T>>((i < beyond ? first : again) + i * row_bytes);
      }
    }
  }
  __device__ __forceinline__ void store(int slot, int count, const Rows<T>& rows) const {
    Stored<T>* const at = tile<T>() + slot * kLanes + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (i < count) at[(slot + i < capacity ? i : i - capacity) * kLanes] = rows[i];
    }
  }
};

}  // namespace tsae::cuda
