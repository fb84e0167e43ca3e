// The kernels for x86 with AVX2 and FMA; only called where the processor has them.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>  // before the target changes: nothing of the standard library may be compiled for it
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define TSAE_TARGET avx2
#define TSAE_VECTOR_BYTES 32
#include "by_dtype.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
