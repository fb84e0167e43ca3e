// The CPU kernels compiled for x86 with AVX-512; ops.cpp calls them only if the processor supports it.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>  // before the target changes: no standard-library code may be compiled for it
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif
#define TSAE_TARGET avx512
#define TSAE_VECTOR_BYTES 64
#include "kernel_table.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
