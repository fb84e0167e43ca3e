// The forward pass: which kernel is launched, and the tuned kernels without counts of transitions.
#include "forward_multiscale.cuh"

namespace tsae::cuda {

bool is_tuned_forward(const Forward& f) {
  const int64_t size = f.dtype == kDouble ? 8 : f.dtype == kFloat ? 4 : 2;
  return size < 8 && f.k < (1 << 27) && (!f.transitions || f.T <= kMostCounted) &&
         is_tuned(f.S, f.bands, f.k, ring_rows(rows_back(f)) * kTile * size);
}

const char* forward(const Forward& f, void* stream) {
  if (!is_tuned_forward(f)) return forward_any(f, stream);
  return f.transitions ? forward_counted(f, stream) : launch_multiscale<false>(f, stream);
}

}  // namespace tsae::cuda
