#include "backward_multiscale.cuh"

namespace tsae::cuda {

template <>
const char* backward_multiscale<Half>(const Backward& f, int64_t blocks, void* stream) {
  return launch_multiscale<Half>(f, blocks, stream);
}

}  // namespace tsae::cuda
