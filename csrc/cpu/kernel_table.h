// The table of kernels for one instruction set, which dispatches each kernel by dtype. avx512.cpp, avx2.cpp and
// baseline.cpp include it.
#pragma once

#include "backward.h"
#include "forward.h"
#include "scans.h"
#include "sparse.h"
#include "step_energy.h"

namespace tsae {
namespace TSAE_TARGET {

#define TSAE_BY_DTYPE(dtype, call)      \
  switch (dtype) {                      \
    case kDouble: call(double); break;  \
    case kFloat: call(float); break;    \
    case kBFloat16: call(BFloat16); break; \
    case kHalf: call(Half); break;      \
  }

static int64_t width(Dtype dtype) { return dtype == kDouble ? Pack<double>::width : Pack<float>::width; }
static void forward(Dtype dtype, const Forward& f, Runs runs, int64_t b, int64_t first, int64_t tiles, void* scratch) {
#define TSAE_CALL(T) forward_tiles<T>(f, runs, b, first, tiles, scratch)
  TSAE_BY_DTYPE(dtype, TSAE_CALL)
#undef TSAE_CALL
  if (f.stream) finish_streaming();
}
static void backward(Dtype dtype, const Backward& f, Runs runs, int64_t b, int64_t first, int64_t tiles,
                     void* scratch) {
#define TSAE_CALL(T)                                                                       \
  f.activation == kRelu   ? backward_tiles<T, kRelu>(f, runs, b, first, tiles, scratch)    \
  : f.activation == kGelu ? backward_tiles<T, kGelu>(f, runs, b, first, tiles, scratch)    \
                          : backward_tiles<T, kIdentity>(f, runs, b, first, tiles, scratch)
  TSAE_BY_DTYPE(dtype, TSAE_CALL)
#undef TSAE_CALL
  if (f.stream) finish_streaming();
}
static void step_energy(Dtype dtype, const Steps& f, int64_t b, int64_t tile) {
#define TSAE_CALL(T) step_energy_tile<T>(f, b, tile)
  TSAE_BY_DTYPE(dtype, TSAE_CALL)
#undef TSAE_CALL
}
static void step_energy_backward(Dtype dtype, const Steps& f, int64_t b, int64_t tile) {
#define TSAE_CALL(T) step_energy_backward_tile<T>(f, b, tile)
  TSAE_BY_DTYPE(dtype, TSAE_CALL)
#undef TSAE_CALL
  if (f.stream) finish_streaming();
}
static int64_t path_rows(Dtype dtype, int64_t T) {
  const int64_t positions = dtype == kDouble ? kPathsPerWord<double> : kPathsPerWord<float>;
  return (T + positions - 1) / positions;
}
static void path(Dtype dtype, const Path& f, Runs runs, int64_t b, int64_t tile, void* scratch) {
#define TSAE_CALL(T) path_tile<T>(f, runs, b, tile, scratch)
  TSAE_BY_DTYPE(dtype, TSAE_CALL)
#undef TSAE_CALL
}
static void leaky(Dtype dtype, const Leaky& f, Runs runs, int64_t b, int64_t tile) {
#define TSAE_CALL(T) leaky_tile<T>(f, runs, b, tile)
  TSAE_BY_DTYPE(dtype, TSAE_CALL)
#undef TSAE_CALL
  if (f.stream) finish_streaming();
}
static void leaky_backward(Dtype dtype, const LeakyBackward& f, Runs runs, int64_t b, int64_t tile) {
#define TSAE_CALL(T) leaky_backward_tile<T>(f, runs, b, tile)
  TSAE_BY_DTYPE(dtype, TSAE_CALL)
#undef TSAE_CALL
  if (f.stream) finish_streaming();
}

#define TSAE_STRING(x) #x
#define TSAE_NAME(x) TSAE_STRING(x)
extern const Kernels kernels = {TSAE_NAME(TSAE_TARGET), sizeof(Pack<float>), width, forward, backward, step_energy,
                                step_energy_backward, path_rows, path, leaky, leaky_backward,
                                nonzeros, weighted_sum, inner_products};

}  // namespace TSAE_TARGET
}  // namespace tsae
