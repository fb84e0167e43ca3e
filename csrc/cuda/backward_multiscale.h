// Launches of the tuned backward kernel, one source file per dtype because each takes minutes to compile.
#pragma once

#include "../shared/dtypes.h"
#include "kernels.h"

namespace tsae::cuda {

// Whether the third window may be shorter than a run.
inline bool may_slide(const Backward& f) { return f.S > 2 && f.bands[5] < f.T - 1; }

// Whether the kernel applies. Rows that enter and leave the third window are read in pairs and, for gelu, not computed.
inline bool is_multiscale(const Backward& f) {
  const bool short_rows = f.k < INT32_MAX / 64;  // eight rows are less than 2 GiB
  const bool slides = f.saved.paired && f.activation != kGelu;
  return is_tuned(f.S, f.bands, f.k, 0) && short_rows && (slides || !may_slide(f));
}

// `blocks`: warps' tiles. Returns null or an error message.
template <class T>
const char* backward_multiscale(const Backward& f, int64_t blocks, void* stream);
template <>
const char* backward_multiscale<float>(const Backward& f, int64_t blocks, void* stream);
template <>
const char* backward_multiscale<BFloat16>(const Backward& f, int64_t blocks, void* stream);
template <>
const char* backward_multiscale<Half>(const Backward& f, int64_t blocks, void* stream);

}  // namespace tsae::cuda
