// The forward pass for any bands, any number of features and float64. docs/mathematics.md, sections 2 to 4.
#include "activation.cuh"
#include "statistics.cuh"
#include "transitions.cuh"

namespace tsae::cuda {
namespace {

// What a walk over a segment carries from block to block for each band, in shared memory.
template <class E>
struct BandState {
  Pair<E> energy, past;  // see band_block in recurrence.h
};

template <class T, Mode mode, class Put>
__device__ __forceinline__ void activate_column(Activate<T, mode>& activate, const Column<T>& pre, int begin, int end,
                                                const Put& put) {
#pragma unroll 8
  for (int t = begin; t < end; ++t)
    put(t, activate(pre.stored(t), activate.thresholds ? splat(__ldg(activate.thresholds + t)) : activate.threshold));
}

// Block by block along T, for all bands at once. The features are in a tile if it is small enough, else in global memory:
// pre, or h where it is written, whose column only this thread writes and reads. What a band reads again there is no
// further back than the band reaches, so it comes from the caches unless the band is very wide.
template <class T, Mode mode, bool counted>
__global__ void __launch_bounds__(kLanes, 8) forward_any_kernel(const __grid_constant__ Forward f) {
  using E = compute_of<T>;
  using V = Pair<E>;
  const Place place = place_of(f.k, kTile);
  const bool tiled = tile_bytes<T>(f.T) <= kMostTileBytes;
  if (tiled) fill_tile<T>(f.pre, f.T, f.k, place);
  await_copies();
  __syncthreads();
  if (place.count == 0) return;

  Stored<T>* const column = tile<T>() + threadIdx.x;
  BandState<E>* const bands =
      reinterpret_cast<BandState<E>*>(shared_memory() + (tiled ? tile_bytes<T>(f.T) : 0)) + threadIdx.x;
  for (int s = 0; s < f.S; ++s) bands[s * kLanes].energy = V{};
  const Column<T> pre = tiled ? Column<T>(column) : Column<T>(f.pre, place);
  const Output<T> h(f.h, f.T, f.k, f.paired, place);
  Column<T> x = pre;
  if (f.h && !tiled) {
    x.at = h.at;
    x.time = f.k;
    x.feature = 1;
    x.paired = h.paired;
  }
  [[maybe_unused]] Transitions transitions;
  const auto put = [&](int t, const Stored<T>& value) {
    if (tiled) column[t * kLanes] = value;
    h(t, value);
  };
  Activate<T, mode> activate(f, place);
  const int* ends = f.ends ? f.ends + place.b * f.T : nullptr;
  V total{}, square{};
  for (int next = 0; next < f.T;) {
    const Run run = run_at(ends, next, f.T);
    next = run.end;
    const int n = run.end - run.begin;
    const Column<T> rows = x.from(run.begin);
    activate.start(run);
    if constexpr (counted) transitions.start();
    V scaled_centre{};
    Sums<V> sums;
    for (int begin = 0; begin < n; begin += kBlock) {
      const int end = smaller(begin + kBlock, n);
      if (f.h) activate_column(activate, pre, run.begin + begin, run.begin + end, put);
      if (run.excluded) continue;
      if constexpr (counted) {
        for (int t = begin; t < end; ++t) transitions.add(is_on<T>(rows.stored(t)));
      }
      if (begin == 0) {
        scaled_centre = scaled_centre_of_first(rows, n);
        for (int s = 0; s < f.S; ++s) bands[s * kLanes].past = V{};
      }
      const Centred<Column<T>, V> y{rows, scaled_centre * kInverseSumScale<E>};
      add_block(y, begin, end, sums);
      for (int s = 0; s < f.S && f.bands[2 * s] < n; ++s) {
        BandState<E>& band = bands[s * kLanes];
        V past = band.past;
        band.energy = band.energy + band_block(y, begin, end, n, f.bands[2 * s], f.bands[2 * s + 1], past);
        band.past = past;
      }
    }
    if (!run.excluded) add_moments(rows, n, scaled_centre, sums, total, square);
  }
  for (int s = 0; s < f.S; ++s) {
    const int64_t at = (place.b * f.S + s) * f.k + place.j;
    store_numbers(f.differences, at, finished_energy(bands[s * kLanes].energy, square), f.paired, place.count);
  }
  write_moments<E>(f, place, total * kInverseSumScale<E>, square);
  if constexpr (counted) transitions.write(f, place);
}

// A bit for each feature of h that is not 0.
template <class T>
__global__ void __launch_bounds__(kLanes) find_active(const __grid_constant__ Forward f) {
  const Place place = place_of(f.k, kTile);
  if (place.count == 0) return;
  const Output<T> h(f.h, f.T, f.k, f.paired, place);
  uint32_t* at = static_cast<uint32_t*>(f.active) + place.b * f.words * f.k + place.j;
  for (int begin = 0; begin < f.T; begin += 32, at += f.k) {
    uint32_t a = 0, b = 0;
    for (int i = 0; i < smaller(32, f.T - begin); ++i) {
      const T* from = h.at + (begin + i) * h.time;
      const Mask active = nonzero<T>(stored_from(from[0], place.count > 1 ? from[1] : T{}));
      a |= uint32_t(active.a) << i;
      b |= uint32_t(active.b) << i;
    }
    at[0] = a;
    if (place.count > 1) at[1] = b;
  }
}

template <class T, bool counted>
auto kernel_for(const Forward& f) {
  if (!f.h || f.activation == kIdentity) return forward_any_kernel<T, Mode::kIdentity, counted>;
  if (f.activation == kGelu) return forward_any_kernel<T, Mode::kGelu, counted>;
  if constexpr (counted) return forward_any_kernel<T, Mode::kThreshold, counted>;
  else if (f.release) return forward_any_kernel<T, Mode::kSchmitt, counted>;
  else return forward_any_kernel<T, Mode::kRelu, counted>;
}

template <class T>
const char* forward_any_of(const Forward& f, void* stream) {
  const int64_t blocks = f.B * ((f.k + kTile - 1) / kTile), tile = tile_bytes<T>(f.T);
  const int64_t state = f.S * kLanes * int64_t(sizeof(BandState<compute_of<T>>));
  const auto kernel = f.transitions ? kernel_for<T, true>(f) : kernel_for<T, false>(f);
  const char* error = launch(kernel, blocks, kLanes, (tile <= kMostTileBytes ? tile : 0) + state, stream, f);
  if (error || !f.active) return error;
  return launch(find_active<T>, blocks, kLanes, 0, stream, f);
}

}  // namespace

const char* forward_any(const Forward& f, void* stream) {
  return with_dtype(f.dtype, [&](auto element) { return forward_any_of<decltype(element)>(f, stream); });
}

}  // namespace tsae::cuda
