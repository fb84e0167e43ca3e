// Tiles (one pack of features of one sequence): loads with prefetching, stores, and the iteration along T.
//
// A tile's row is one or a few cache lines, so an iteration along T reads the features once from memory. It proceeds
// block by block: the rows before and after a block that the windows need are in a ring buffer in `scratch`, which
// stays in the L1 or L2 cache however long the sequence is.
#pragma once

#include "kernels.h"
#include "simd.h"
#include "ring_buffer.h"

namespace tsae {
namespace TSAE_TARGET {

struct Tile {  // `count` features of sequence b, starting at j
  int64_t b, j;
  int count;
  int64_t ahead;  // prefetch distance in elements

  TSAE_INLINE Tile(int64_t k, int64_t width, int64_t b, int64_t tile, int64_t ahead = 0)
      : b(b), j(tile * width), count(smaller(width, k - j)), ahead(ahead) {}
};

template <class T>
struct Reader {  // one tile of `Features`
  using V = Pack<compute_of<T>>;
  const T* row;  // of t = 0
  int64_t time, ahead;
  bool constant;
  int count;

  TSAE_INLINE Reader(const Features& x, const Tile& tile)
      : row(reinterpret_cast<const T*>(x.data) + tile.b * x.batch + tile.j * x.feature), time(x.time),
        ahead(tile.ahead), constant(x.feature == 0), count(tile.count) {}
  TSAE_INLINE V operator()(int64_t t) const {
    const T* at = row + t * time;
    for (unsigned i = 0; i < sizeof(Stored<T>); i += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(at + ahead) + i, 0, 2);
    return again(t);
  }
  TSAE_INLINE V again(int64_t t) const {  // a row that was read before, without prefetching
    const T* at = row + t * time;
    if (constant) {
      Stored<T> same;
      load_some<T>(same, at, 1);
      return splat(widen<T>(same).v[0][0]);
    }
    return widen<T>(load<T>(at, count));
  }
};

template <class T>
struct Writer {  // one tile of a contiguous result
  T* row;  // of t = 0
  int64_t time;
  int count;
  bool streamed;

  TSAE_INLINE Writer(void* data, int64_t T_, int64_t k, bool stream_results, const Tile& tile)
      : row(static_cast<T*>(data) + tile.b * T_ * k + tile.j), time(k), count(tile.count),
        streamed(stream_results && count == Pack<compute_of<T>>::width) {}
  TSAE_INLINE void operator()(int64_t t, const Stored<T>& x) const {
    if (streamed) stream<T>(row + t * time, x);
    else store<T>(row + t * time, x, count);
  }
};

// Calls block(i, run, begin, tile) for the blocks of all runs, each for tile first + i for i = 0 to tiles - 1.
//
// A tile's row is short and the next row k elements away, a pattern that hardware prefetchers do not follow. So while a
// row's page is in the TLB, each tile prefetches what the next tile reads from it; the last tile of a group prefetches the
// first tile's part of the next block.
template <int64_t width, class Block>
TSAE_INLINE void block_by_block(const Features& x, int64_t T, int64_t k, Runs runs, int64_t b, int64_t first,
                                int64_t tiles, const Block& block) {
  for (int64_t r = 0; r < runs.count; ++r) {
    const Run& run = runs.first[r];
    for (int begin = 0; begin < run.end - run.begin; begin += kBlock) {
      for (int64_t i = 0; i < tiles; ++i) {
        const bool next_tile = T <= kRowsKept || i + 1 < tiles;
        block(i, run, begin, Tile(k, width, b, first + i, next_tile ? width : kBlock * x.time - i * width));
      }
    }
  }
}

}  // namespace TSAE_TARGET
}  // namespace tsae
