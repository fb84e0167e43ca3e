// Segment ends: for each segment of a sequence, and each run of excluded positions, the position where it ends.
#include "tile.cuh"

namespace tsae::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kNone = 0x7fffffff;

struct SegmentEnds {
  const int64_t* ids;  // [B, T]
  int T;
  int* ends;  // [B, T]
};

// One block per sequence, in chunks from its end to its start: a run ends where the next one starts.
__global__ void __launch_bounds__(kThreads) segment_ends_kernel(const __grid_constant__ SegmentEnds f) {
  int* starts = reinterpret_cast<int*>(shared_memory());  // [kThreads]: next start in the chunk
  const int64_t row = int64_t(blockIdx.x) * f.T;
  const int i = threadIdx.x;
  int following = f.T;  // the first start after this chunk
  for (int begin = (f.T - 1) / kThreads * kThreads; begin >= 0; begin -= kThreads) {
    const int t = begin + i;
    const int64_t id = t < f.T ? f.ids[row + t] : 0;
    const bool starts_here = t < f.T && (t == 0 || f.ids[row + t - 1] != id);
    starts[i] = starts_here ? t : kNone;
    __syncthreads();
    for (int reach = 1; reach < kThreads; reach *= 2) {
      const int other = i + reach < kThreads ? starts[i + reach] : kNone;
      __syncthreads();
      starts[i] = smaller(starts[i], other);
      __syncthreads();
    }
    const int next = smaller(i + 1 < kThreads ? starts[i + 1] : kNone, following);
    if (starts_here) f.ends[row + t] = id < 0 ? -next : next;
    following = smaller(starts[0], following);
    __syncthreads();
  }
}

}  // namespace

const char* find_segment_ends(const int64_t* ids, int64_t B, int T, int* ends, void* stream) {
  return launch(segment_ends_kernel, B, kThreads, kThreads * sizeof(int), stream, SegmentEnds{ids, T, ends});
}

#define TSAE_STRING_OF(...) #__VA_ARGS__
#define TSAE_STRING(...) TSAE_STRING_OF(__VA_ARGS__)
#ifdef __CUDACC__
const char* built_for() { return TSAE_STRING(__CUDACC_VER_MAJOR__) "." TSAE_STRING(__CUDACC_VER_MINOR__); }
const char* architectures() { return TSAE_STRING(__CUDA_ARCH_LIST__); }
#else
const char* built_for() { return "none (emulated)"; }
const char* architectures() { return "host"; }
#endif

}  // namespace tsae::cuda
