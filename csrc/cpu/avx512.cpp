// The kernels for x86 with AVX-512; only called where the processor has it.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>  // before the target changes: nothing of the standard library may be compiled for it
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif
#define TSAE_TARGET avx512
#define TSAE_VECTOR_BYTES 64
#include "by_dtype.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
