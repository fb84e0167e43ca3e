// The backward pass: grad_pre and grad_bias from one read of h (for gelu, pre) and grad_h. docs/mathematics.md, section
// 2.
//
// This file: the kernel for any bands, and the choice between it and the tuned one (backward_multiscale.cuh).
#include "backward_multiscale.h"
#include "gradient.cuh"

namespace tsae::cuda {
namespace {

// Any bands. h is in a tile if that is small enough, else read from global memory.
template <class T, int kWindows>
__global__ void __launch_bounds__(kLanes, 8) backward_any(const __grid_constant__ Backward f) {
  using E = compute_of<T>;
  using V = Pair<E>;
  const Place place = place_of(f.k, kTile);
  const bool tiled = tile_bytes<T>(f.T) <= kMostTileBytes;
  if (tiled) fill_tile<T>(f.saved, f.T, f.k, place);
  Gradient<T> gradient(f, place);
  await_copies();
  const bool any = __syncthreads_or(gradient.has_windows());
  if (place.count == 0) return;

  Stored<T>* const column = tile<T>() + threadIdx.x;
  if (f.activation == kGelu && tiled && any) gelu_in_place<T>(column, f.T, gradient.bias);
  const Column<T> saved(f.saved, place);
  const Columns<T> columns{tiled ? Column<T>(column) : saved, saved, Column<T>(f.grad_h, place),
                           Output<T>(f.grad_pre, f.T, f.k, f.paired, place), tiled};
  const int* ends = f.ends ? f.ends + place.b * f.T : nullptr;
  Window<V> windows[kWindows];
  if (any) load_windows(gradient, place, windows);
  for (int next = 0; next < f.T;) {
    const Run run = run_at(ends, next, f.T);
    next = run.end;
    any_run(run, columns, any && !run.excluded && run.end - run.begin > 1, gradient, windows);
  }
  gradient.write_bias(place);
}

template <class T>
const char* backward_of(const Backward& f, void* stream) {
  const int64_t blocks = f.B * ((f.k + kTile - 1) / kTile), bytes = tile_bytes<T>(f.T);
  if constexpr (sizeof(T) < 8) {
    if (is_multiscale(f)) return backward_multiscale<T>(f, blocks, stream);
  }
  const int64_t shared = bytes <= kMostTileBytes ? bytes : 0;
  const auto kernel = f.number_of_windows <= 4 ? backward_any<T, 4> : backward_any<T, kMostWindows>;
  return launch(kernel, blocks, kLanes, shared, stream, f);
}

}  // namespace

const char* backward(const Backward& f, void* stream) {
  return with_dtype(f.dtype, [&](auto element) { return backward_of<decltype(element)>(f, stream); });
}

}  // namespace tsae::cuda
