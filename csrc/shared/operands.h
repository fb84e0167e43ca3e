// What the operators on the host and the kernels of both devices agree on. All sizes and strides are in elements;
// "compute type" is double for double features and float for all others.
#pragma once

#include <cstdint>

namespace tsae {

// Sums run over blocks of this many positions, which are then summed: the rounding error of n terms grows with
// kBlock + n / kBlock instead of n.
constexpr int kBlock = 64;

enum Activation : int64_t { kIdentity = 0, kRelu = 1, kGelu = 2 };
enum Dtype : int { kDouble = 0, kFloat = 1, kBFloat16 = 2, kHalf = 3 };

// [B, T, k] with any strides but the last, which is 1, or 0 for a tensor that is constant along k.
struct Features {
  const char* data = nullptr;
  int64_t batch = 0, time = 0, feature = 1;
};

// A window of the backward pass and the bands whose gradients make its share: g[plus] - g[minus], -1 for none.
struct Share {
  int reach, plus, minus;
};

}  // namespace tsae
