// The interface between the operators (ops.cpp) and the kernels (*.cu). Without PyTorch, so that the kernels compile
// without it.
#pragma once

#include "../shared/operands.h"

namespace tsae::cuda {

constexpr int kMostBands = 8;
constexpr int kMostWindows = 2 * kMostBands;

// A tile is 64 features of one sequence at all T positions: one warp, two features per lane.
constexpr int kLanes = 32;
constexpr int kTile = 2 * kLanes;

// Tiles up to this many bytes are in shared memory: two of them fit on a multiprocessor of every architecture.
constexpr int64_t kMostTileBytes = 80 << 10;

struct Source {  // features in global memory
  Features x;
  bool vectorized;  // rows, and the features of a row, can be copied in pieces of 16 bytes; they are < 2^27 bytes apart
  bool paired;      // a thread's two features can be read in one load
};

struct Forward {
  int64_t B, k;
  int T;
  Dtype dtype;
  Source pre;
  Activation activation;
  const void* bias;        // [k] compute type, or null
  const void* threshold;       // [k] or [B, T] compute type, >= 0, or null for 0
  bool threshold_per_position;
  const void* release;     // [k] compute type, >= 0, or null: no Schmitt trigger
  const int* ends;         // [B, T], from find_segment_ends, or null: each sequence is one segment
  int S;
  int bands[2 * kMostBands];  // [S][2], offsets clamped to T
  bool paired;             // results: k is even, so a thread's two features can be written in one store
  void* h;                 // [B, T, k], or null: statistics only
  void* active;            // [B, words, k] of 32 bits, a bit for each position, or null; for relu
  int64_t words;           // ceil(T / 32)
  int ring;                // rows of the tuned kernels' ring in shared memory
  void* differences;       // [B, S, k] compute type
  void* total;             // [B, k]
  void* square;            // [B, k]
  void* transitions;       // [B, 3, k] int32: pairs on to on, on to off, off to on; or null
};

struct Backward {
  int64_t B, k;
  int T;
  Dtype dtype;
  Source saved, grad_h;  // h, or for gelu pre; grad_h.x.data may be null
  Activation activation;
  const void* bias;              // [k] compute type or null, for gelu
  const void* grad_differences;  // [1 or B, S, k] compute type, or null
  int64_t differences_batch;     // stride over the batch, may be 0
  const int* ends;
  int S;
  int bands[2 * kMostBands];
  int number_of_windows;
  BackwardWindow windows[kMostWindows];
  const void* grad_total;   // [B, k] compute type or null
  const void* grad_square;  // [B, k] compute type or null
  const void* total;        // [B, k] compute type: the sum of h over T, or null; not used with segments
  bool paired;
  void* grad_pre;           // [B, T, k]
  void* grad_bias;          // [B, k] compute type: summed over T, not yet over the batch
};

struct Steps {
  int64_t B, k;
  int T;
  Dtype dtype;
  Source h;
  const void* weights;  // [B, T] compute type; the last of each row is not used
  const double* grad;   // backward: gradient of the loss
  double* energy;       // forward: [B, blocks_of_steps(k)]
  bool paired;
  void* grad_h;         // backward: [B, T, k]
};
constexpr int kStepThreads = 128;
constexpr int64_t blocks_of_steps(int64_t k) { return (k + 2 * kStepThreads - 1) / (2 * kStepThreads); }

// The scans (scans.cu), in blocks like those of `Steps`.
constexpr int kPathPositions = 16;  // to a word of decisions
struct Path {
  int64_t B, k;
  int T;
  Dtype dtype;
  Source z;
  const void* levels;  // [kPathLevels, k] compute type
  const int64_t* ids;  // segments [B, T], or null
  bool paired;
  int words;           // ceil(T / kPathPositions)
  void* decisions;     // [B, words, k] of 32 bits
  void* on;            // [B, T, k] of 8 bits, 0 or 1
};

struct Leaky {
  int64_t B, k;
  int T;
  Dtype dtype;
  Source a;
  const void* decay;   // [k] compute type
  const int64_t* ids;  // segments [B, T], or null
  bool paired;
  void* h;             // [B, T, k]
};

struct LeakyBackward {
  int64_t B, k;
  int T;
  Dtype dtype;
  Source grad_h, a, h;  // a.x.data and h.x.data may be null: grad_decay is then 0
  const void* decay;    // [k] compute type
  const int64_t* ids;   // segments [B, T], or null
  bool paired;
  void* grad_a;         // [B, T, k]
  void* grad_decay;     // [B, k] compute type: summed over T, not yet over the batch
};

// Whether the tuned kernels apply: bands (1, 3), (4, 15) and optionally one that begins at 16, an even k, and a tile
// that fits into shared memory. It depends on nothing else, so the statistics of h have the same bits whether they are
// computed with the activation or alone.
inline bool is_tuned(int S, const int* bands, int64_t k, int64_t tile_bytes) {
  const bool inner = S >= 2 && bands[0] == 1 && bands[1] == 3 && bands[2] == 4 && bands[3] == 15;
  return inner && (S == 2 || (S == 3 && bands[4] == 16)) && k % 2 == 0 && tile_bytes <= kMostTileBytes;
}

// Whether the tuned kernels apply to f; otherwise h must be given with `active`. With transitions they take fewer
// positions.
bool is_tuned_forward(const Forward& f);

// Each launches its kernel on `stream` (a cudaStream_t) and returns null or an error message.
const char* find_segment_ends(const int64_t* ids, int64_t B, int T, int* ends, void* stream);
const char* forward(const Forward& f, void* stream);
const char* forward_any(const Forward& f, void* stream);      // which `forward` calls if no tuned kernel applies
const char* forward_counted(const Forward& f, void* stream);  // if one does, with transitions
const char* backward(const Backward& f, void* stream);
const char* step_energy(const Steps& f, void* stream);
const char* step_energy_backward(const Steps& f, void* stream);
const char* viterbi_path(const Path& f, void* stream);
const char* leaky_recurrence(const Leaky& f, void* stream);
const char* leaky_recurrence_backward(const LeakyBackward& f, void* stream);

const char* built_for();      // CUDA version
const char* architectures();  // sm_80, ...

}  // namespace tsae::cuda
