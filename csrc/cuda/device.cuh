// All GPU-specific functions: launches, shared memory, asynchronous copies, conversions. The tests replace this header
// with one that runs the same kernels on the host (tests/tsae_kernels/cuda_emulation).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace tsae::cuda {

// Dynamic shared memory: at least as much as the launch requested, aligned to 16 bytes.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char tsae_shared_memory[];
  return tsae_shared_memory;
}

// Copies `bytes` bytes, at most 16, from global to shared memory without passing through registers, and zeros up to 16
// bytes. Completes with await_copies and a barrier.
__device__ __forceinline__ void copy_async(void* to, const void* from, int bytes) {
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(at), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_async(void* to, const void* from) {
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;\n" ::"r"(at), "l"(from) : "memory");
}
__device__ __forceinline__ void await_copies() { asm volatile("cp.async.wait_all;\n" ::: "memory"); }

// Makes a group of this thread's copies since the last one. await_copies_but waits for all but the latest groups.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int groups>
__device__ __forceinline__ void await_copies_but() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(groups) : "memory");
}

// x, which is the same in all lanes of the warp: the compiler then knows it.
__device__ __forceinline__ int of_warp(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// Reads 4 or 8 bytes of shared memory. As assembly, because the compiler merges loads of two branches into one with an
// address for each, which takes an instruction and a register more.
using SharedAddress = unsigned;
__device__ __forceinline__ SharedAddress shared_address(const void* at) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(at));
}
template <class X>
__device__ __forceinline__ X load_shared(SharedAddress at) {
  static_assert(sizeof(X) == 4 || sizeof(X) == 8);
  X x;
  if constexpr (sizeof(X) == 4) {
    unsigned word;
    asm volatile("ld.shared.b32 %0, [%1];\n" : "=r"(word) : "r"(at) : "memory");
    memcpy(&x, &word, sizeof x);
  } else {
    uint2 words;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];\n" : "=r"(words.x), "=r"(words.y) : "r"(at) : "memory");
    memcpy(&x, &words, sizeof x);
  }
  return x;
}

// The value, about which the compiler knows nothing: keeps it from moving work out of a branch that is rarely taken.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
__device__ __forceinline__ int64_t opaque(int64_t x) {
  asm volatile("" : "+l"(x));
  return x;
}

__device__ __forceinline__ float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return __fma_rn(a, b, c); }
__device__ __forceinline__ float fast_exponential(float x) { return __expf(x); }
__device__ __forceinline__ float fast_reciprocal(float x) { return __fdividef(1.f, x); }

__device__ __forceinline__ int count_ones(uint32_t word) { return __popc(word); }

// Two bfloat16 or two halves in one word, the first in the low bits.
__device__ __forceinline__ void widen_bfloat16(uint32_t word, float& first, float& second) {
  first = __uint_as_float(word << 16);
  second = __uint_as_float(word & 0xffff0000u);
}
__device__ __forceinline__ uint32_t narrow_bfloat16(float first, float second) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&both);
}
__device__ __forceinline__ void widen_half(uint32_t word, float& first, float& second) {
  const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&word));
  first = both.x;
  second = both.y;
}
__device__ __forceinline__ uint32_t narrow_half(float first, float second) {
  const __half2 both = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&both);
}

// Launches `kernel` with one argument. Returns null or an error message.
template <class Argument>
const char* launch(void (*kernel)(Argument), int64_t blocks, int threads, int64_t shared_bytes, void* stream,
                   const Argument& argument) {
  if (blocks == 0) return nullptr;
  if (blocks > INT32_MAX) return "too many features for one launch";
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 0) {
    // The largest shared-memory carveout, and more dynamic shared memory than the default 48 KiB.
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (error == cudaSuccess && shared_bytes > (48 << 10))
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error != cudaSuccess) return cudaGetErrorString(cudaGetLastError());
  }
  kernel<<<unsigned(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(argument);
  error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace tsae::cuda
