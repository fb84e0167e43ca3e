// The kernels for whatever the compiler takes as the machine's minimum: SSE2, NEON, ...
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#define TSAE_TARGET baseline
#define TSAE_VECTOR_BYTES 16
#include "by_dtype.h"
