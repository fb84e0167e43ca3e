// The interface between the operators (ops.cpp) and the kernels compiled for each instruction set (kernel_table.h).
#pragma once

#include "../shared/operands.h"

namespace tsae {

// A maximal run [begin, end) of equal ids in one sequence: a segment, or excluded positions.
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
  const void* threshold;     // [k] or [B, T] compute type, >= 0, or null for 0
  bool threshold_per_position;
  const void* release;   // [k] compute type, >= 0, or null: no Schmitt trigger
  const int* bands;      // [S][2], offsets clamped to T
  int64_t S;
  int64_t ring;          // rows of the ring buffer
  bool stream;           // write h with streaming stores
  void* h;               // [B, T, k], or null: statistics only
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
  const BackwardWindow* windows;
  int64_t number_of_windows;
  int reach;                // of the widest window
  int64_t ring;             // rows of the ring buffer
  const void* grad_total;   // [B, k] compute type or null
  const void* grad_square;  // [B, k] compute type or null
  bool stream;              // write grad_pre with streaming stores
  void* grad_pre;           // [B, T, k]
  void* grad_bias;          // [B, k] compute type: summed over T, not yet over the batch
};

struct Steps {
  int64_t T, k;
  Features h;
  const void* weights;  // [B, T] compute type; the last of each row is not used
  double scale;         // backward: gradient of the loss
  double* energy;       // forward: [B, tiles]
  bool stream;          // backward: write grad_h with streaming stores
  void* grad_h;         // backward: [B, T, k]
};

struct Path {
  int64_t T, k;
  Features z;
  const void* levels;  // [kPathLevels][k] compute type
  uint8_t* on;         // [B, T, k]
};

struct Leaky {
  int64_t T, k;
  Features a;
  const void* decay;  // [k] compute type
  bool stream;        // write h with streaming stores
  void* h;            // [B, T, k]
};

struct LeakyBackward {
  int64_t T, k;
  Features grad_h, a, h;  // a.data and h.data may be null: grad_decay is then 0
  const void* decay;      // [k] compute type
  bool stream;            // write grad_a with streaming stores
  void* grad_a;           // [B, T, k]
  void* grad_decay;       // [B, k] compute type: summed over T, not yet over the batch
};

// A sequence of up to kRowsKept rows is processed one tile at a time. In longer sequences kTilesTogether adjacent tiles
// are processed together, block by block: every row is on different memory pages, whose addresses the processor then
// translates once for all these tiles.
constexpr int kRowsKept = 512;
constexpr int kTilesTogether = 6;

// The kernels for one instruction set. A tile is `width` adjacent features of sequence b. `forward` and `backward`
// process `tiles` tiles, at most kTilesTogether. For each tile, `scratch` has `ring` rows plus 2 per band (forward) or
// 3 per window (backward), of `row_bytes` bytes each, aligned to 64 bytes.
struct Kernels {
  const char* name;
  int64_t row_bytes;
  int64_t (*width)(Dtype);
  void (*forward)(Dtype, const Forward&, Runs, int64_t b, int64_t first, int64_t tiles, void* scratch);
  void (*backward)(Dtype, const Backward&, Runs, int64_t b, int64_t first, int64_t tiles, void* scratch);
  void (*step_energy)(Dtype, const Steps&, int64_t b, int64_t tile);
  void (*step_energy_backward)(Dtype, const Steps&, int64_t b, int64_t tile);
  // See scans.h. `scratch` has path_rows(dtype, T) rows.
  int64_t (*path_rows)(Dtype, int64_t T);
  void (*path)(Dtype, const Path&, Runs, int64_t b, int64_t tile, void* scratch);
  void (*leaky)(Dtype, const Leaky&, Runs, int64_t b, int64_t tile);
  void (*leaky_backward)(Dtype, const LeakyBackward&, Runs, int64_t b, int64_t tile);
  // On float32 rows (nonzeros: also bfloat16); see sparse.h.
  int64_t (*nonzeros)(Dtype, const void* x, int64_t n, int32_t* index, float* value);
  void (*weighted_sum)(const float* rows, int64_t d, const int32_t* index, const float* weight, int64_t count,
                       float* out);
  void (*inner_products)(const float* rows, int64_t d, const int32_t* index, int64_t count, const float* g,
                         float* out);
};

// The kernels for the widest instruction set of this processor, see ops.cpp.
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
