// The tuned kernels that count transitions: kernels of their own, so that the others have no instruction for it.
#include "forward_multiscale.cuh"

namespace tsae::cuda {

const char* forward_counted(const Forward& f, void* stream) { return launch_multiscale<true>(f, stream); }

}  // namespace tsae::cuda
