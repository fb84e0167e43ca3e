// The CPU kernels compiled for x86 with AVX2 and FMA; ops.cpp calls them only if the processor supports both.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>  // before the target changes: no standard-library code may be compiled for it
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define TSAE_TARGET avx2
#define TSAE_VECTOR_BYTES 32
#include "kernel_table.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
