// Transitions of one thread's two features between on and off. docs/mathematics.md, section 7.
#pragma once

#include "tile.cuh"

namespace tsae::cuda {

// Whether each feature is on: h > 0, or NaN, which compares false.
template <class T>
__device__ __forceinline__ Mask is_on(const Stored<T>& h) {
  const Pair<compute_of<T>> x = widen<T>(h);
  return {!(x.a <= 0), !(x.b <= 0)};
}

__device__ __forceinline__ void write_transitions(const Forward& f, const Place& place, const Pair<int>& still,
                                                  const Pair<int>& leaves, const Pair<int>& enters) {
  const int64_t at = place.b * 3 * f.k + place.j;
  store_numbers(f.transitions, at, still, f.paired, place.count);
  store_numbers(f.transitions, at + f.k, leaves, f.paired, place.count);
  store_numbers(f.transitions, at + 2 * f.k, enters, f.paired, place.count);
}

// Counts, position by position, the pairs of a segment's positions that are on at both, turn off, and turn on.
struct Transitions {
  Pair<int> still{}, leaves{}, enters{};
  Mask before{};  // on at the last position
  bool in_pair = false;

  __device__ __forceinline__ void start() { in_pair = false; }
  __device__ __forceinline__ void add(const Mask& on) {
    if (in_pair) {
      still = still + Pair<int>{before.a && on.a, before.b && on.b};
      leaves = leaves + Pair<int>{before.a && !on.a, before.b && !on.b};
      enters = enters + Pair<int>{on.a && !before.a, on.b && !before.b};
    }
    before = on;
    in_pair = true;
  }
  __device__ __forceinline__ void write(const Forward& f, const Place& place) const {
    write_transitions(f, place, still, leaves, enters);
  }
};

// Positions up to which the counts of a sequence fit into 16 bits.
constexpr int kMostCounted = 1 << 16;

// The same for blocks of up to 16 positions, from a bit for each. A word holds both features, the first in the low half,
// because the tuned kernels have few registers left.
struct BlockTransitions {
  static constexpr uint32_t kFirst = 0x00010001u;  // the first position of both features

  uint32_t still = 0, leaves = 0, enters = 0;
  uint32_t last = 0;   // whether they are on at the last position, at the bits of the first
  uint32_t pairs = 0;  // which positions of the next block are in a pair with the one before

  __device__ __forceinline__ void start(const Run& run) { pairs = run.excluded ? 0u : ~kFirst; }

  // a, b: which of the next `count` positions of the run each feature is on at; the bits beyond are 0.
  template <bool full>  // there are 16
  __device__ __forceinline__ void add(uint32_t a, uint32_t b, int count) {
    const uint32_t on = a | b << 16, before = (on << 1 & ~kFirst) | last;
    const uint32_t counted = full ? pairs : pairs & ((1u << count) - 1) * kFirst;
    still += of_each(before & on & counted);
    leaves += of_each(before & ~on & counted);
    enters += of_each(on & ~before & counted);
    last = on >> (full ? 15 : count - 1) & kFirst;
    pairs |= pairs >> 1 & kFirst;
  }
  __device__ __forceinline__ void write(const Forward& f, const Place& place) const {
    write_transitions(f, place, halves(still), halves(leaves), halves(enters));
  }

 private:
  // The number of ones in each half: those of the word less those of its high half go to the low half.
  static __device__ __forceinline__ uint32_t of_each(uint32_t bits) {
    return uint32_t(count_ones(bits)) + uint32_t(count_ones(bits >> 16)) * 0xffffu;
  }
  static __device__ __forceinline__ Pair<int> halves(uint32_t counts) {
    return {int(counts & 0xffffu), int(counts >> 16)};
  }
};

}  // namespace tsae::cuda
