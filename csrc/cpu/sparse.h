// Rows of float32 numbers, added and multiplied with a few weights. Included once per instruction set, after pack.h.
#pragma once

#include "kernels.h"
#include "pack.h"

namespace tsae {
namespace TSAE_TARGET {

// The numbers of x [n] that are not 0 (NaN is not), in order: how many there are, and where index is not null their
// places and values.
static int64_t nonzeros(const float* x, int64_t n, int32_t* index, float* value) {
  using V = Pack<float>;
  int64_t count = 0, j = 0;
  for (; j < n; j += V::width) {
    const int64_t end = j + V::width < n ? j + V::width : n;
    if (end - j == V::width) {
      Stored<float> x_j = load<float>(x + j, V::width);
      Word any{};
      TSAE_EACH_VECTOR any |= bits_of(x_j.v[i]);
      bool skip = true;
      for (unsigned lane = 0; lane < sizeof(Word) / sizeof(unsigned); ++lane) skip = skip && (any[lane] << 1) == 0;
      if (skip) continue;
    }
    for (int64_t at = j; at < end; ++at) {
      if (x[at] == 0) continue;
      if (index) index[count] = int32_t(at), value[count] = x[at];
      ++count;
    }
  }
  return count;
}

// out [d] = sum over i of weight[i] * rows[index[i]], rows [*, d]. Four rows at a time, as `out` is then loaded and
// stored once for four products.
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

// out[index[i]] = <g, rows[index[i]]> for every i; other numbers of `out` stay. g [d], rows [*, d].
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
