// What the operators (ops.cpp) and the kernels (*.cu) agree on. Nothing of PyTorch, so that the kernels compile without it.
#pragma once

#include "../shared/operands.h"

namespace tsae::cuda {

constexpr int kMostBands = 8;
constexpr int kMostWindows = 2 * kMostBands;

// A tile is the 64 features of one warp, two to a lane, at all T positions of one sequence.
constexpr int kLanes = 32;
constexpr int kTile = 2 * kLanes;

// Tiles up to this many bytes go to shared memory: two of them still fit on one multiprocessor of every architecture.
constexpr int64_t kMostTileBytes = 80 << 10;

struct Source {  // features in global memory
  Features x;
  bool whole;   // may be copied in pieces of 16 bytes
  bool paired;  // a thread's two neighbours may be read at once
};

struct Forward {
  int64_t B, k;
  int T;
  Dtype dtype;
  Source pre;
  Activation activation;
  const void* bias;        // [k] compute type, or null
  const void* level;       // [k] or [B, T] compute type, >= 0, or null for 0
  bool level_per_position;
  const void* release;     // [k] compute type, >= 0, or null: no Schmitt trigger
  const int* ends;         // [B, T], from find_runs, or null: every sequence is one segment
  int S;
  int bands[2 * kMostBands];  // [S][2], reaches limited to T
  bool paired;             // results: a thread's two neighbours may be written at once, k is even
  void* h;                 // [B, T, k], or null: statistics alone
  void* differences;       // [B, S, k] compute type
  void* total;             // [B, k]
  void* square;            // [B, k]
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
  Share windows[kMostWindows];
  const void* grad_total;   // [B, k] compute type or null
  const void* grad_square;  // [B, k] compute type or null
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

// The case that the kernels are tuned for: bands (1, 3), (4, 15) and perhaps one from 16 on, pairs of features that can be
// written at once, and a tile that fits. It depends on nothing else, so that the statistics of h are the same to the last
// bit whether they come with the activation or alone.
inline bool is_tuned(int S, const int* bands, int64_t k, int64_t tile_bytes) {
  const bool inner = S >= 2 && bands[0] == 1 && bands[1] == 3 && bands[2] == 4 && bands[3] == 15;
  return inner && (S == 2 || (S == 3 && bands[4] == 16)) && k % 2 == 0 && tile_bytes <= kMostTileBytes;
}

// Each puts its kernel on the stream (a cudaStream_t) and returns null, or what went wrong.
const char* find_runs(const int64_t* ids, int64_t B, int T, int* ends, void* stream);
const char* forward(const Forward& f, void* stream);
const char* backward(const Backward& f, void* stream);
const char* step_energy(const Steps& f, void* stream);
const char* step_energy_backward(const Steps& f, void* stream);

const char* built_for();      // version of CUDA
const char* architectures();  // sm_80, ...

}  // namespace tsae::cuda
