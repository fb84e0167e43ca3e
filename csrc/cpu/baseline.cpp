// The CPU kernels compiled for the compiler's default instruction set: SSE2, NEON, ...
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#define TSAE_TARGET baseline
#define TSAE_VECTOR_BYTES 16
#include "kernel_table.h"
