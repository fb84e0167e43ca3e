// The emulated device (tests/tsae_kernels/cuda_emulation), with each launch reported to a callback before it runs: the
// kernel's offset in this library, the launch's size and the kernel's argument. Used by tools/kernel_count.
#pragma once

#define launch run_on_host
#include "emulated_device.h"
#undef launch

#include <dlfcn.h>

namespace tsae::cuda {

using Recorder = void (*)(uint64_t kernel, int64_t blocks, int threads, int64_t shared_bytes, const void* argument,
                          uint64_t size);
inline Recorder& recorder() {
  static Recorder function = nullptr;
  return function;
}

template <class Argument>
const char* launch(void (*kernel)(Argument), int64_t blocks, int threads, int64_t shared_bytes, void* stream,
                   const Argument& argument) {
  Dl_info library;
  dladdr(reinterpret_cast<void*>(kernel), &library);
  const uint64_t offset = reinterpret_cast<uint64_t>(kernel) - reinterpret_cast<uint64_t>(library.dli_fbase);
  if (recorder()) recorder()(offset, blocks, threads, shared_bytes, &argument, sizeof argument);
  return run_on_host(kernel, blocks, threads, shared_bytes, stream, argument);
}

}  // namespace tsae::cuda

extern "C" __attribute__((visibility("default"), weak)) void tsae_record_launches(tsae::cuda::Recorder function) {
  tsae::cuda::recorder() = function;
}
