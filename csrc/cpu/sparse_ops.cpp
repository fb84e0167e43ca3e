// Sparse matrix products on a CPU, for features that are mostly 0; tsae_kernels/sparse.py calls them. The arithmetic is
// float32; features and their gradient may be bfloat16.
//
// Compressed sparse rows (CSR): `offsets` [N + 1] int64, and row by row the column (int32) and value (float32) of each
// nonzero entry.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace tsae {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Compressed = std::tuple<Tensor, Tensor, Tensor>;

template <class T>
const T* data_of(const char* name, const Tensor& x, ScalarType dtype, int64_t dimensions) {
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == dtype && x.dim() == dimensions && x.is_contiguous(), name,
                  " has the wrong device, dtype, number of dimensions or strides for this operator");
  return static_cast<const T*>(x.const_data_ptr());
}

Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

// The data of compressed rows, whose columns must be less than `width`.
struct Rows {
  int64_t count, entries;
  const int64_t* offsets;
  const int32_t* columns;
  const float* values;

  Rows(const Tensor& offsets_, const Tensor& columns_, const Tensor& values_, int64_t width)
      : count(offsets_.numel() - 1), entries(columns_.numel()),
        offsets(data_of<int64_t>("offsets", offsets_, ScalarType::Long, 1)),
        columns(data_of<int32_t>("columns", columns_, ScalarType::Int, 1)),
        values(data_of<float>("values", values_, ScalarType::Float, 1)) {
    STD_TORCH_CHECK(count >= 0 && values_.numel() == entries && offsets[0] == 0 && offsets[count] == entries &&
                        std::is_sorted(offsets, offsets + count + 1),
                    "offsets must rise from 0 to the number of columns and values");
    for (int64_t i = 0; i < entries; ++i)
      STD_TORCH_CHECK(columns[i] >= 0 && columns[i] < width, "columns must be less than ", width);
  }
};

// Fewest rows worth waking a thread for, if a row takes about `work` operations.
int64_t grain(int64_t work) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, work)); }

uint16_t narrowed(float x) {  // to the nearest bfloat16, ties to even; NaN stays NaN
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// x [N, k], float32 or bfloat16.
Compressed compress(Tensor x) {
  const bool half = x.scalar_type() == ScalarType::BFloat16;
  const auto* data = half ? reinterpret_cast<const char*>(data_of<uint16_t>("x", x, ScalarType::BFloat16, 2))
                          : reinterpret_cast<const char*>(data_of<float>("x", x, ScalarType::Float, 2));
  const Dtype dtype = half ? kBFloat16 : kFloat;
  const int64_t row_bytes = x.size(1) * x.element_size();
  const int64_t N = x.size(0), k = x.size(1);
  STD_TORCH_CHECK(k < (int64_t(1) << 31), "x must have fewer than 2^31 columns");
  Tensor offsets = empty(x, {N + 1}, ScalarType::Long);
  int64_t* end = static_cast<int64_t*>(offsets.mutable_data_ptr());
  end[0] = 0;
  torch::stable::parallel_for(0, N, grain(k), [&](int64_t begin, int64_t stop) {
    for (int64_t n = begin; n < stop; ++n)
      end[n + 1] = kernels().nonzeros(dtype, data + n * row_bytes, k, nullptr, nullptr);
  });
  for (int64_t n = 0; n < N; ++n) end[n + 1] += end[n];
  Tensor columns = empty(x, {end[N]}, ScalarType::Int), values = empty(x, {end[N]}, ScalarType::Float);
  auto* to_columns = static_cast<int32_t*>(columns.mutable_data_ptr());
  auto* to_values = static_cast<float*>(values.mutable_data_ptr());
  torch::stable::parallel_for(0, N, grain(k), [&](int64_t begin, int64_t stop) {
    for (int64_t n = begin; n < stop; ++n)
      kernels().nonzeros(dtype, data + n * row_bytes, k, to_columns + end[n], to_values + end[n]);
  });
  return {offsets, columns, values};
}

// The transpose of [N, k] as compressed rows of [k, N], each in ascending order of columns.
Compressed transpose(Tensor offsets, Tensor columns, Tensor values, int64_t k) {
  const Rows rows(offsets, columns, values, k);
  STD_TORCH_CHECK(rows.count < (int64_t(1) << 31), "there must be fewer than 2^31 rows");
  Tensor new_offsets = empty(values, {k + 1}, ScalarType::Long), new_columns = empty(values, {rows.entries}, ScalarType::Int),
         new_values = empty(values, {rows.entries}, ScalarType::Float);
  int64_t* end = static_cast<int64_t*>(new_offsets.mutable_data_ptr());
  std::fill(end, end + k + 1, 0);
  for (int64_t i = 0; i < rows.entries; ++i) ++end[rows.columns[i] + 1];
  for (int64_t j = 0; j < k; ++j) end[j + 1] += end[j];
  std::vector<int64_t> next(end, end + k);
  auto* to_columns = static_cast<int32_t*>(new_columns.mutable_data_ptr());
  auto* to_values = static_cast<float*>(new_values.mutable_data_ptr());
  for (int64_t n = 0; n < rows.count; ++n) {
    for (int64_t i = rows.offsets[n]; i < rows.offsets[n + 1]; ++i) {
      const int64_t at = next[rows.columns[i]]++;
      to_columns[at] = int32_t(n);
      to_values[at] = rows.values[i];
    }
  }
  return {new_offsets, new_columns, new_values};
}

// The product of compressed rows [N, k] and dense [k, d]: [N, d].
Tensor matmul(Tensor offsets, Tensor columns, Tensor values, Tensor dense) {
  const float* data = data_of<float>("dense", dense, ScalarType::Float, 2);
  const int64_t d = dense.size(1);
  const Rows rows(offsets, columns, values, dense.size(0));
  Tensor out = empty(dense, {rows.count, d}, ScalarType::Float);
  float* to = static_cast<float*>(out.mutable_data_ptr());
  const int64_t mean = rows.entries / std::max<int64_t>(1, rows.count) + 1;
  torch::stable::parallel_for(0, rows.count, grain(mean * d), [&](int64_t begin, int64_t stop) {
    for (int64_t n = begin; n < stop; ++n) {
      const int64_t first = rows.offsets[n];
      kernels().weighted_sum(data, d, rows.columns + first, rows.values + first, rows.offsets[n + 1] - first,
                             to + n * d);
    }
  });
  return out;
}

// left [N, d] @ right^T, right [k, d], at the nonzero positions of compressed rows [N, k]; 0 elsewhere. Out: dense [N,
// k], bfloat16 if `half`, else float32.
Tensor sampled_matmul(Tensor offsets, Tensor columns, Tensor values, Tensor left, Tensor right, bool half) {
  const float* from = data_of<float>("left", left, ScalarType::Float, 2);
  const float* data = data_of<float>("right", right, ScalarType::Float, 2);
  const int64_t d = right.size(1), k = right.size(0);
  const Rows rows(offsets, columns, values, k);
  STD_TORCH_CHECK(left.size(0) == rows.count && left.size(1) == d, "left must be [rows, right.size(1)]");
  Tensor out = empty(left, {rows.count, k}, half ? ScalarType::BFloat16 : ScalarType::Float);
  const int64_t width = k * (half ? sizeof(uint16_t) : sizeof(float));
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t mean = rows.entries / std::max<int64_t>(1, rows.count) + 1;
  torch::stable::parallel_for(0, rows.count, grain(mean * d + k), [&](int64_t begin, int64_t stop) {
    std::vector<float> row(half ? k : 0);
    for (int64_t n = begin; n < stop; ++n) {
      const int64_t first = rows.offsets[n], last = rows.offsets[n + 1];
      std::memset(to + n * width, 0, width);
      float* products = half ? row.data() : reinterpret_cast<float*>(to + n * width);
      kernels().inner_products(data, d, rows.columns + first, last - first, from + n * d, products);
      if (!half) continue;
      auto* halves = reinterpret_cast<uint16_t*>(to + n * width);
      for (int64_t i = first; i < last; ++i) halves[rows.columns[i]] = narrowed(row[rows.columns[i]]);
    }
  });
  return out;
}

}  // namespace
}  // namespace tsae

STABLE_TORCH_LIBRARY_FRAGMENT(tsae_kernels_cpp, library) {
  library.def("sparse_compress(Tensor x) -> (Tensor, Tensor, Tensor)");
  library.def("sparse_transpose(Tensor offsets, Tensor columns, Tensor values, int k) -> (Tensor, Tensor, Tensor)");
  library.def("sparse_matmul(Tensor offsets, Tensor columns, Tensor values, Tensor dense) -> Tensor");
  library.def(
      "sparse_sampled_matmul(Tensor offsets, Tensor columns, Tensor values, Tensor left, Tensor right, bool half)"
      " -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tsae_kernels_cpp, CPU, library) {
  library.impl("sparse_compress", TORCH_BOX(&tsae::compress));
  library.impl("sparse_transpose", TORCH_BOX(&tsae::transpose));
  library.impl("sparse_matmul", TORCH_BOX(&tsae::matmul));
  library.impl("sparse_sampled_matmul", TORCH_BOX(&tsae::sampled_matmul));
}
