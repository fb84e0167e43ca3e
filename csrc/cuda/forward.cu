// The forward pass: activation and temporal statistics from one read of pre. docs/mathematics.md, sections 2 to 4.
//
// A block is one warp with its tile. Memory traffic per column (b, j) of bfloat16 [B, 128, k] with three bands: 256
// bytes read, 256 written for h and 20 for the statistics; the statistics alone read 256 and write 20.
#include "activation.cuh"
#include "statistics.cuh"

namespace tsae::cuda {
namespace {

// Writes the sums of a complete sequence.
template <class T, class E = compute_of<T>>
__device__ __forceinline__ void write_moments(const Forward& f, const Place& place, const Pair<E>& total,
                                              const Pair<E>& square) {
  const int64_t at = place.b * f.k + place.j;
  store_numbers(f.total, at, total * kInverseSumScale<E>, f.paired, place.count);
  store_numbers(f.square, at, square, f.paired, place.count);
}

template <class T, Mode mode>
__global__ void __launch_bounds__(kLanes, kResident<T>) forward_multiscale(const __grid_constant__ Forward f) {
  using E = compute_of<T>;
  using V = Pair<E>;
  const Place place = place_of(f.k, kTile);
  fill_tile<T>(f.pre, f.T, f.k, place);
  await_copies();
  __syncthreads();
  if (place.count == 0) return;

  const TileColumn<T> x{tile<T>() + threadIdx.x};
  const int* ends = f.ends ? f.ends + place.b * f.T : nullptr;
  V near{}, far{}, third{}, total{}, square{};
  for (int begin = 0; begin < f.T;) {
    const Run run = run_at(ends, begin, f.T);
    begin = run.end;
    if (f.h) {
      T* to = static_cast<T*>(f.h) + (place.b * f.T + run.begin) * f.k + place.j;
      activate<T, mode>(f, place, run, x, [&](int t, const Stored<T>& value) {
        x.at[t * kLanes] = value;
        *reinterpret_cast<Stored<T>*>(to) = value;
        to += f.k;
      });
    }
    if (run.excluded) continue;
    const int n = run.end - run.begin;
    const TileColumn<T> rows = x.from(run.begin);
    const V scaled_centre = scaled_centre_of(rows, n);
    const Centred<TileColumn<T>, V> y{rows, scaled_centre * kInverseSumScale<E>};
    const Sums<V> sums = walk_multiscale<V>(y, n);
    const V run_near = sums.near * E(-2), run_far = sums.far * E(-2);
    near = near + run_near;
    far = far + run_far;
    if (f.S > 2 && n > kFarLast + 1) third = third + third_band(y, n, f.bands[5], run_near, run_far, sums);
    add_moments(rows, n, scaled_centre, sums, total, square);
  }
  const int64_t at = place.b * f.S * f.k + place.j;
  store_numbers(f.differences, at, finished_energy(near, square), true, 2);
  store_numbers(f.differences, at + f.k, finished_energy(far, square), true, 2);
  if (f.S > 2) store_numbers(f.differences, at + 2 * f.k, finished_energy(third, square), true, 2);
  write_moments<T>(f, place, total, square);
}

// Any bands and any T, with one pass per band. The features are in a tile if it is small enough, else in global memory:
// pre, or h where it is written, whose column only this thread writes and reads.
template <class T>
__global__ void __launch_bounds__(kLanes, 8) forward_any(const __grid_constant__ Forward f) {
  using E = compute_of<T>;
  using V = Pair<E>;
  const Place place = place_of(f.k, kTile);
  const bool tiled = tile_bytes<T>(f.T) <= kMostTileBytes;
  if (tiled) fill_tile<T>(f.pre, f.T, f.k, place);
  await_copies();
  __syncthreads();
  if (place.count == 0) return;

  Stored<T>* const column = tile<T>() + threadIdx.x;
  const Column<T> pre = tiled ? Column<T>(column) : Column<T>(f.pre, place);
  const Output<T> h(f.h, f.T, f.k, f.paired, place);
  Column<T> x = pre;
  if (f.h && !tiled) {
    x.at = h.at;
    x.time = f.k;
    x.feature = 1;
    x.paired = h.paired;
  }
  const auto put = [&](int t, const Stored<T>& value) {
    if (tiled) column[t * kLanes] = value;
    h(t, value);
  };
  const int* ends = f.ends ? f.ends + place.b * f.T : nullptr;
  V total{}, square{};
  for (int begin = 0; f.h && begin < f.T;) {
    const Run run = run_at(ends, begin, f.T);
    begin = run.end;
    if (f.activation == kIdentity) activate<T, Mode::kIdentity>(f, place, run, pre, put);
    else if (f.activation == kGelu) activate<T, Mode::kGelu>(f, place, run, pre, put);
    else if (f.release) activate<T, Mode::kSchmitt>(f, place, run, pre, put);
    else activate<T, Mode::kRelu>(f, place, run, pre, put);
  }
  for (int begin = 0; begin < f.T;) {
    const Run run = run_at(ends, begin, f.T);
    begin = run.end;
    if (run.excluded) continue;
    const int n = run.end - run.begin;
    const Column<T> rows = x.from(run.begin);
    const V scaled_centre = scaled_centre_of(rows, n);
    const Centred<Column<T>, V> y{rows, scaled_centre * kInverseSumScale<E>};
    add_moments(rows, n, scaled_centre, walk_moments<V>(y, n), total, square);
  }
  for (int s = 0; s < f.S; ++s) {
    const int first = f.bands[2 * s], last = f.bands[2 * s + 1];
    V energy{};
    for (int begin = 0; begin < f.T;) {
      const Run run = run_at(ends, begin, f.T);
      begin = run.end;
      const int n = run.end - run.begin;
      if (run.excluded || n <= first) continue;
      const Column<T> rows = x.from(run.begin);
      const Centred<Column<T>, V> y{rows, scaled_centre_of(rows, n) * kInverseSumScale<E>};
      energy = energy + band_energy<V>(y, n, first, last);
    }
    const int64_t at = (place.b * f.S + s) * f.k + place.j;
    store_numbers(f.differences, at, finished_energy(energy, square), f.paired, place.count);
  }
  write_moments<T>(f, place, total, square);
}

template <class T>
const char* forward_of(const Forward& f, void* stream) {
  const int64_t blocks = f.B * ((f.k + kTile - 1) / kTile), bytes = tile_bytes<T>(f.T);
  const bool tiled = bytes <= kMostTileBytes;
  if constexpr (sizeof(T) < 8) {
    if (is_tuned(f.S, f.bands, f.k, bytes)) {
      const auto kernel = f.activation == kIdentity ? forward_multiscale<T, Mode::kIdentity>
                          : f.activation == kGelu   ? forward_multiscale<T, Mode::kGelu>
                          : f.release               ? forward_multiscale<T, Mode::kSchmitt>
                                                    : forward_multiscale<T, Mode::kRelu>;
      return launch(kernel, blocks, kLanes, bytes, stream, f);
    }
  }
  return launch(forward_any<T>, blocks, kLanes, tiled ? bytes : 0, stream, f);
}

}  // namespace

const char* forward(const Forward& f, void* stream) {
  return with_dtype(f.dtype, [&](auto element) { return forward_of<decltype(element)>(f, stream); });
}

}  // namespace tsae::cuda
