// What the operators (ops.cpp) and the kernels built for each instruction set (by_dtype.h) agree on.
#pragma once

#include "../shared/operands.h"

namespace tsae {

// A maximal stretch [begin, end) of one sequence: a segment, or positions that are excluded.
struct Run {
  int begin, end;
  bool excluded;
};
struct Runs {
  const Run* first;
  int64_t count;
};

struct Forward {
  int64_t T, k;
  Features pre;
  Activation activation;
  const void* bias;      // [k] compute type, or null
  const void* level;     // [k] or [B, T] compute type, >= 0, or null for 0
  bool level_per_position;
  const void* release;   // [k] compute type, >= 0, or null: no Schmitt trigger
  const int* bands;      // [S][2], reaches limited to T
  int64_t S;
  int64_t ring;          // rows of the scratch ring
  bool stream;           // write h past the caches
  void* h;               // [B, T, k], or null: statistics alone
  void* differences;     // [B, S, k] compute type
  void* total;           // [B, k]
  void* square;          // [B, k]
};

struct Backward {
  int64_t T, k;
  Features saved, grad_h;  // h, or for gelu pre; grad_h.data may be null
  Activation activation;
  const void* bias;              // [k] compute type or null, for gelu
  const void* grad_differences;  // [1 or B, S, k] compute type, or null
  int64_t differences_batch;     // stride over the batch, may be 0
  int64_t S;
  const Share* shares;
  int64_t number_of_shares;
  int reach;                // of the widest
  int64_t ring;             // rows of the scratch ring
  const void* grad_total;   // [B, k] compute type or null
  const void* grad_square;  // [B, k] compute type or null
  bool stream;              // write grad_pre past the caches
  void* grad_pre;           // [B, T, k]
  void* grad_bias;          // [B, k] compute type: summed over T, not yet over the batch
};

struct Steps {
  int64_t T, k;
  Features h;
  const void* weights;  // [B, T] compute type; the last of each row is not used
  double scale;         // backward: gradient of the loss
  double* energy;       // forward: [B, tiles]
  bool stream;          // backward: write grad_h past the caches
  void* grad_h;         // backward: [B, T, k]
};

// Up to so many rows a tile is walked from end to end alone. Of longer sequences a few neighbouring tiles go in step,
// block by block: every row lies on pages of its own, which the processor then finds once for all of them.
constexpr int kRowsKept = 512;
constexpr int kTilesTogether = 6;

// A tile is `width` neighbouring features of sequence b. `forward` and `backward` do `tiles` of them, at most
// kTilesTogether, `scratch` having for each of them rows of `row_bytes` bytes, aligned to 64: `ring` of them, and 2 for
// each band (forward) or 3 for each window (backward).
struct Kernels {
  const char* name;
  int64_t row_bytes;
  int64_t (*width)(Dtype);
  void (*forward)(Dtype, const Forward&, Runs, int64_t b, int64_t first, int64_t tiles, void* scratch);
  void (*backward)(Dtype, const Backward&, Runs, int64_t b, int64_t first, int64_t tiles, void* scratch);
  void (*step_energy)(Dtype, const Steps&, int64_t b, int64_t tile);
  void (*step_energy_backward)(Dtype, const Steps&, int64_t b, int64_t tile);
  // On rows of float32, the first also of bfloat16; see sparse.h.
  int64_t (*nonzeros)(Dtype, const void* x, int64_t n, int32_t* index, float* value);
  void (*weighted_sum)(const float* rows, int64_t d, const int32_t* index, const float* weight, int64_t count,
                       float* out);
  void (*inner_products)(const float* rows, int64_t d, const int32_t* index, int64_t count, const float* g,
                         float* out);
};

// Those for the widest instruction set of this processor, see ops.cpp.
const Kernels& kernels();

namespace baseline {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

}  // namespace tsae
