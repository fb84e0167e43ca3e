// Kernels of the sparse products in sparse_ops.cpp: nonzero entries of a row, weighted sums and inner products of rows.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace tsae {
namespace TSAE_TARGET {

// Bit i is set if lane i is nonzero. NaN counts as nonzero, -0 as zero.
TSAE_INLINE unsigned lanes_not_0(Floats x) {
#if defined(__x86_64__) && TSAE_VECTOR_BYTES == 64
  return _mm512_cmp_ps_mask((__m512)x, _mm512_setzero_ps(), _CMP_NEQ_UQ);
#elif defined(__x86_64__) && TSAE_VECTOR_BYTES == 32
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, _mm256_setzero_ps(), _CMP_NEQ_UQ));
#elif defined(__x86_64__) && TSAE_VECTOR_BYTES == 16
  return _mm_movemask_ps(_mm_cmpneq_ps((__m128)x, _mm_setzero_ps()));
#else
  unsigned bits = 0;
  for (unsigned lane = 0; lane < sizeof(x) / sizeof(float); ++lane) bits |= unsigned(x[lane] != 0) << lane;
  return bits;
#endif
}

// The number of nonzero entries of x [n]; if index is not null, also their indices and values, in order.
template <class T>
static int64_t nonzeros(const T* x, int64_t n, int32_t* index, float* value) {
  using V = Pack<float>;
  int64_t found = 0;
  for (int64_t j = 0; j < n; j += V::width) {
    const V x_j = widen<T>(load<T>(x + j, int(j + V::width < n ? V::width : n - j)));
    for (int i = 0; i < kVectors; ++i) {
      unsigned bits = lanes_not_0(x_j.v[i]);
      if (!index) {
        found += __builtin_popcount(bits);
        continue;
      }
      for (; bits; bits &= bits - 1) {
        const int lane = __builtin_ctz(bits);
        index[found] = int32_t(j + i * V::lanes + lane);
        value[found++] = x_j.v[i][lane];
      }
    }
  }
  return found;
}
static int64_t nonzeros(Dtype dtype, const void* x, int64_t n, int32_t* index, float* value) {
  return dtype == kBFloat16 ? nonzeros(static_cast<const BFloat16*>(x), n, index, value)
                            : nonzeros(static_cast<const float*>(x), n, index, value);
}

// out [d] = sum over i of weight[i] * rows[index[i]], rows [*, d]. Four rows at a time, so that `out` is loaded and
// stored once per four products.
static void weighted_sum(const float* rows, int64_t d, const int32_t* index, const float* weight, int64_t count,
                         float* __restrict out) {
  for (int64_t x = 0; x < d; ++x) out[x] = 0;
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const float *a = rows + index[i] * d, *b = rows + index[i + 1] * d, *c = rows + index[i + 2] * d,
                *e = rows + index[i + 3] * d;
    const float wa = weight[i], wb = weight[i + 1], wc = weight[i + 2], we = weight[i + 3];
    for (int64_t x = 0; x < d; ++x) out[x] += (wa * a[x] + wb * b[x]) + (wc * c[x] + we * e[x]);
  }
  for (; i < count; ++i) {
    const float* a = rows + index[i] * d;
    const float wa = weight[i];
    for (int64_t x = 0; x < d; ++x) out[x] += wa * a[x];
  }
}

// out[index[i]] = <g, rows[index[i]]> for every i; the rest of `out` is unchanged. g [d], rows [*, d].
static void inner_products(const float* rows, int64_t d, const int32_t* index, int64_t count, const float* g,
                           float* out) {
  using V = Pack<float>;
  for (int64_t i = 0; i < count; ++i) {
    const float* row = rows + index[i] * d;
    V sum{};
    int64_t x = 0;
    for (; x + V::width <= d; x += V::width) {
      sum = sum + widen<float>(load<float>(g + x, V::width)) * widen<float>(load<float>(row + x, V::width));
    }
    const auto lanes = (sum.v[0] + sum.v[1]) + (sum.v[2] + sum.v[3]);
    float total = 0;
    for (int lane = 0; lane < V::lanes; ++lane) total += lanes[lane];
    for (; x < d; ++x) total += g[x] * row[x];
    out[index[i]] = total;
  }
}

}  // namespace TSAE_TARGET
}  // namespace tsae
