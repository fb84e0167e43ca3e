// Launches of the tuned backward kernel, one source file per dtype because each takes minutes to compile.
#pragma once

#include "../shared/dtypes.h"
#include "kernels.h"

namespace tsae::cuda {

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
