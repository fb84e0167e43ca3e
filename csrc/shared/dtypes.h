// Element types of the features (double, float, BFloat16, Half) and the compute type of each.
#pragma once

#include <cstdint>

#include "operands.h"

namespace tsae {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// double for double, float for the others.
template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using compute_of = typename ComputeOf<T>::type;

// f(T{}) for the element type T of `dtype`.
template <class F>
auto with_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case kDouble: return f(double{});
    case kFloat: return f(float{});
    case kBFloat16: return f(BFloat16{});
    default: return f(Half{});
  }
}

}  // namespace tsae
