// Types that operators pass to the kernels of both devices. All sizes and strides are in elements; "compute type" means
// double for double features and float for all others.
#pragma once

#include <cstdint>

namespace tsae {

// Sums are taken over blocks of this many positions, then over blocks: the rounding error of n terms grows with
// kBlock + n / kBlock instead of n.
constexpr int kBlock = 64;

// Rows of the costs of a two-state path, see two_state.h.
constexpr int kPathLevels = 5;

enum Activation : int64_t { kIdentity = 0, kRelu = 1, kGelu = 2 };
enum Dtype : int { kDouble = 0, kFloat = 1, kBFloat16 = 2, kHalf = 3 };

// [B, T, k] with any strides, except that the last is 1, or 0 for a tensor that is constant along k.
struct Features {
  const char* data = nullptr;
  int64_t batch = 0, time = 0, feature = 1;
};

// The window |u - t| <= reach of the backward pass. Its weight is the gradient of band `plus` minus that of band
// `minus`; -1 for none.
struct BackwardWindow {
  int reach, plus, minus;
};

}  // namespace tsae
