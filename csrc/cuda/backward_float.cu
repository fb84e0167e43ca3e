#include "backward_multiscale.cuh"

namespace tsae::cuda {

template <>
const char* backward_multiscale<float>(const Backward& f, int64_t blocks, void* stream) {
  return launch_multiscale<float>(f, blocks, stream);
}

}  // namespace tsae::cuda
