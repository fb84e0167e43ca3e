// The Schmitt trigger's state update, for host and device kernels: docs/mathematics.md, section 7.
#pragma once

#include "recurrence.h"

namespace tsae {
namespace TSAE_TARGET {

// Which features are off at this position. `off_before` must be true where no state carries over (at a segment's start
// and at excluded positions). NaN compares false, so it stays on and visible.
template <class V, class Mask>
TSAE_INLINE Mask stays_off(const V& z, const V& threshold, const V& release, const Mask& off_before) {
  return less_equal(z, threshold) & (less_equal(z, release) | off_before);
}

}  // namespace TSAE_TARGET
}  // namespace tsae
