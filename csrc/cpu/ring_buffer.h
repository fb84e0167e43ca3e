// The ring buffer of a run's latest rows, and faster overloads of recurrence.h's `in_turn` and `half_degrees` for it.
#pragma once

#include "simd.h"

namespace tsae {
namespace TSAE_TARGET {

// Vector by vector, because g++ 12 copies a struct through the stack.
template <class E>
TSAE_INLINE Pack<E> in_registers(const Pack<E>& x) {
  Pack<E> out;
  TSAE_EACH_VECTOR out.v[i] = x.v[i];
  return out;
}

template <class E>
struct Ring {  // `Rows` of recurrence.h: the latest of a run
  Pack<E>* rows;
  int64_t size, base;

  // Only rows [first, first + size) are accessed.
  TSAE_INLINE Ring(void* rows, int64_t size, int64_t first)
      : rows(static_cast<Pack<E>*>(rows)), size(size), base(first > 0 ? first - first % size : 0) {}
  TSAE_INLINE Pack<E>& operator[](int64_t t) const {
    t -= base;
    return rows[t < size ? t : t - size];
  }
  TSAE_INLINE Pack<E> operator()(int t) const { return in_registers((*this)[t]); }
};

// Rows of a ring in turn, by an offset that wraps: computing the address would cost more than the arithmetic on a row.
template <class E>
struct RingInTurn {
  const char* rows;
  int64_t at, size;  // in bytes

  TSAE_INLINE Pack<E> operator()() const { return in_registers(*reinterpret_cast<const Pack<E>*>(rows + at)); }
  TSAE_INLINE void next() {
    at += sizeof(Pack<E>);
    at = at == size ? 0 : at;
  }
};
// t may be outside the ring's rows, as long as it is not read there.
template <class E>
TSAE_INLINE RingInTurn<E> in_turn(const Ring<E>& y, int t) {
  const int64_t at = t - y.base, row = at < y.size ? at : at - y.size;
  return {reinterpret_cast<const char*>(y.rows), row * int64_t(sizeof(Pack<E>)), y.size * int64_t(sizeof(Pack<E>))};
}

// A number for each position of a block, computed for the full block at once so that the compiler vectorizes it.
template <class E>
struct OfBlock {
  int begin;
  E values[kBlock];
  TSAE_INLINE E operator()(int t) const { return values[t - begin]; }
};
template <class E, class F>
TSAE_INLINE OfBlock<E> of_block(int begin, int end, const F& f) {
  OfBlock<E> out;
  out.begin = begin;
  for (int t = begin; t < end; ++t) out.values[t - begin] = f(t);
  return out;
}
template <class E>
TSAE_INLINE OfBlock<E> half_degrees(const Ring<E>&, int begin, int end, int n, int first, int last) {
  return of_block<E>(begin, end, HalfDegrees<E>{n, first, last});
}

}  // namespace TSAE_TARGET
}  // namespace tsae
