// The recursion of the cheapest on/off path, for host and device kernels: docs/mathematics.md, section 8.
#pragma once

#include "recurrence.h"

namespace tsae {
namespace TSAE_TARGET {

// The rows of `levels`, from tsae_kernels/backends/two_state.py, and the smaller and larger of the first two.
template <class V>
struct PathLevels {
  V stay_off, stay_on, sign, offset, start, low, high;
};

// `load(i)` is row i.
template <class V, class Load>
TSAE_INLINE PathLevels<V> path_levels(const Load& load) {
  PathLevels<V> out{load(0), load(1), load(2), load(3), load(4), V{}, V{}};
  const auto lasts = less_equal(out.stay_off, out.stay_on);
  out.low = select(lasts, out.stay_off, out.stay_on);
  out.high = select(lasts, out.stay_on, out.stay_off);
  return out;
}

// The cost of on rather than off at a position: -z^2, or `infinity` where on is not allowed (NaN is not).
template <class V>
TSAE_INLINE V cost_of_on(const V& z, const V& infinity) {
  return select(less(V{}, z), V{} - z * z, infinity);
}

// The excess cost at the next position, before that position's own cost.
template <class V>
TSAE_INLINE V next_excess(const PathLevels<V>& at, const V& excess) {
  const V above = select(less(excess, at.low), at.low, excess);
  return select(less(at.high, above), at.high, above) * at.sign + at.offset;
}

}  // namespace TSAE_TARGET
}  // namespace tsae
