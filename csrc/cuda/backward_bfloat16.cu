#include "backward_multiscale.cuh"

namespace tsae::cuda {

template <>
const char* backward_multiscale<BFloat16>(const Backward& f, int64_t blocks, void* stream) {
  return launch_multiscale<BFloat16>(f, blocks, stream);
}

}  // namespace tsae::cuda
