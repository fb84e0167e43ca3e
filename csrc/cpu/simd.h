// Pack, four SIMD vectors of adjacent features at one position: arithmetic, conversion of the element types, loads and
// stores. In the compiler's vector types, which exist for any instruction set. Four vectors hide the latency of a
// recurrence along T, whose steps depend on each other.
#pragma once

#include "../shared/dtypes.h"
#include "../shared/recurrence.h"

namespace tsae {
namespace TSAE_TARGET {

constexpr int kVectors = 4;
#define TSAE_EACH_VECTOR _Pragma("GCC unroll 4") for (int i = 0; i < kVectors; ++i)

template <class E>
struct Pack {
  static constexpr int lanes = TSAE_VECTOR_BYTES / sizeof(E);
  static constexpr int width = kVectors * lanes;
  typedef E Vector __attribute__((vector_size(TSAE_VECTOR_BYTES)));
  Vector v[kVectors];
};

template <class E>
struct ElementOf<Pack<E>> {
  using type = E;
};

template <class E>
struct Mask {
  using Vector = decltype(typename Pack<E>::Vector{} <= typename Pack<E>::Vector{});
  Vector v[kVectors];
};

#define TSAE_OPERATOR(Type, op)                                        \
  template <class E>                                                   \
  TSAE_INLINE Type<E> operator op(const Type<E>& a, const Type<E>& b) { \
    Type<E> out;                                                       \
    TSAE_EACH_VECTOR out.v[i] = a.v[i] op b.v[i];                      \
    return out;                                                        \
  }
TSAE_OPERATOR(Pack, +)
TSAE_OPERATOR(Pack, -)
TSAE_OPERATOR(Pack, *)
TSAE_OPERATOR(Pack, /)
TSAE_OPERATOR(Mask, &)
TSAE_OPERATOR(Mask, |)
#undef TSAE_OPERATOR

template <class E>
TSAE_INLINE Pack<E> splat(E value) {
  Pack<E> out;
  TSAE_EACH_VECTOR out.v[i] = value - typename Pack<E>::Vector{};  // "0 + value" would lose the sign of -0
  return out;
}
template <class E>
TSAE_INLINE Pack<E> operator*(const Pack<E>& a, E b) {
  Pack<E> out;
  TSAE_EACH_VECTOR out.v[i] = a.v[i] * b;
  return out;
}
template <class E>
TSAE_INLINE Mask<E> less_equal(const Pack<E>& a, const Pack<E>& b) {
  Mask<E> out;
  TSAE_EACH_VECTOR out.v[i] = a.v[i] <= b.v[i];
  return out;
}
template <class E>
TSAE_INLINE Mask<E> less(const Pack<E>& a, const Pack<E>& b) {
  Mask<E> out;
  TSAE_EACH_VECTOR out.v[i] = a.v[i] < b.v[i];
  return out;
}
template <class E>
TSAE_INLINE Mask<E> equal(const Pack<E>& a, const Pack<E>& b) {
  Mask<E> out;
  TSAE_EACH_VECTOR out.v[i] = a.v[i] == b.v[i];
  return out;
}
template <class E>
TSAE_INLINE Mask<E> everywhere() {
  Mask<E> out;
  TSAE_EACH_VECTOR out.v[i] = typename Mask<E>::Vector{} == typename Mask<E>::Vector{};
  return out;
}
template <class E>
TSAE_INLINE Pack<E> select(const Mask<E>& mask, const Pack<E>& yes, const Pack<E>& no) {
  Pack<E> out;
  TSAE_EACH_VECTOR out.v[i] = mask.v[i] ? yes.v[i] : no.v[i];
  return out;
}

// ---- features in memory -------------------------------------------------------------------------------------------

typedef unsigned Word __attribute__((vector_size(TSAE_VECTOR_BYTES)));
typedef unsigned short HalfWord __attribute__((vector_size(TSAE_VECTOR_BYTES / 2)));
typedef float Floats __attribute__((vector_size(TSAE_VECTOR_BYTES)));

// Casts between vector types are free, because the values are in registers.
TSAE_INLINE Word bits_of(Floats x) { return (Word)x; }
TSAE_INLINE Floats floats_of(Word x) { return (Floats)x; }

template <class T>
struct Format {  // float and double: unchanged
  using Stored = typename Pack<T>::Vector;
  static TSAE_INLINE Stored widen(Stored x) { return x; }
  static TSAE_INLINE Stored narrow(Stored x) { return x; }
};

template <>
struct Format<BFloat16> {  // the upper half of a float
  using Stored = HalfWord;
  static TSAE_INLINE Floats widen(Stored x) { return floats_of(__builtin_convertvector(x, Word) << 16); }
  static TSAE_INLINE Stored narrow(Floats x) {
    const Word u = bits_of(x);
    const Word nearest_even = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const Word quiet_nan = Word{} + 0x7fc0u;
    return __builtin_convertvector(x == x ? nearest_even : quiet_nan, HalfWord);
  }
};

template <>
struct Format<Half> {  // 5 bits of exponent, 10 of mantissa
  using Stored = HalfWord;
  static TSAE_INLINE Floats widen(Stored x) {
    const Word u = __builtin_convertvector(x, Word);
    const Word exponent_and_mantissa = (u & 0x7fffu) << 13;
    const Word normal = exponent_and_mantissa + (112u << 23);             // exponent bias 15 -> 127
    const Word infinite = exponent_and_mantissa + (224u << 23);           // 31 -> 255
    const Floats least_normal = floats_of(Word{} + (113u << 23));         // 2^-14
    const Word small = bits_of(floats_of(exponent_and_mantissa + (113u << 23)) - least_normal);
    Word out = exponent_and_mantissa < (1u << 23) ? small : normal;
    out = exponent_and_mantissa >= (31u << 23) ? infinite : out;
    return floats_of(out | ((u & 0x8000u) << 16));
  }
  static TSAE_INLINE Stored narrow(Floats x) {
    const Word u = bits_of(x);
    const Word magnitude = u & 0x7fffffffu;
    // Normal: round the 13 dropped bits to even. A carry may reach infinity, as it should.
    const Word normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Below 2^-14: adding 1/2 makes the float adder round to multiples of 2^-24, the spacing of subnormal halves.
    const Floats half = Floats{} + 0.5f;
    const Word small = bits_of(floats_of(magnitude) + half) - bits_of(half);
    const Word infinite = Word{} + 0x7c00u, nan = Word{} + 0x7e00u;
    Word out = magnitude < (113u << 23) ? small : normal;
    out = magnitude >= (143u << 23) ? infinite : out;  // 2^16 and above
    out = magnitude > (255u << 23) ? nan : out;
    return __builtin_convertvector(out | ((u >> 16) & 0x8000u), HalfWord);
  }
};

// Features as stored, before conversion.
template <class T>
struct Stored {
  typename Format<T>::Stored v[kVectors];
};

template <class T>
TSAE_INLINE Pack<compute_of<T>> widen(const Stored<T>& x) {
  Pack<compute_of<T>> out;
  TSAE_EACH_VECTOR out.v[i] = Format<T>::widen(x.v[i]);
  return out;
}
template <class T>
TSAE_INLINE Stored<T> narrow(const Pack<compute_of<T>>& x) {
  Stored<T> out;
  TSAE_EACH_VECTOR out.v[i] = Format<T>::narrow(x.v[i]);
  return out;
}

// A stored vector at any address: features are only aligned to their own size.
template <class T>
struct Unaligned {
  typedef typename Format<T>::Stored type __attribute__((aligned(sizeof(T)), may_alias));
};

template <class T>
__attribute__((noinline)) void load_some(Stored<T>& out, const T* from, int count) {
  __builtin_memset(&out, 0, sizeof(out));
  __builtin_memcpy(&out, from, count * sizeof(T));
}
template <class T>
__attribute__((noinline)) void store_some(T* to, const Stored<T>& x, int count) {
  __builtin_memcpy(to, &x, count * sizeof(T));
}

// The first `count` features of a pack from memory, then zeros.
template <class T>
TSAE_INLINE Stored<T> load(const T* from, int count) {
  using V = Pack<compute_of<T>>;
  Stored<T> out;
  if (__builtin_expect(count == V::width, 1)) {
    TSAE_EACH_VECTOR out.v[i] = *reinterpret_cast<const typename Unaligned<T>::type*>(from + i * V::lanes);
  } else {
    Stored<T> some;
    load_some<T>(some, from, count);
    out = some;
  }
  return out;
}
template <class T>
TSAE_INLINE void store(T* to, const Stored<T>& x, int count) {
  using V = Pack<compute_of<T>>;
  if (__builtin_expect(count == V::width, 1)) {
    TSAE_EACH_VECTOR *reinterpret_cast<typename Unaligned<T>::type*>(to + i * V::lanes) = x.v[i];
  } else {
    const Stored<T> some = x;
    store_some<T>(to, some, count);
  }
}

// Streaming store of a full pack to an aligned address. For results that exceed the caches, where a plain store would
// first read the memory that it overwrites.
template <class T>
TSAE_INLINE void stream(T* to, const Stored<T>& x) {
  using Vector = typename Format<T>::Stored;
  TSAE_EACH_VECTOR {
    Vector* at = reinterpret_cast<Vector*>(to) + i;
#if defined(__x86_64__)
    if constexpr (sizeof(Vector) == 64) _mm512_stream_si512(reinterpret_cast<__m512i*>(at), (__m512i)x.v[i]);
    if constexpr (sizeof(Vector) == 32) _mm256_stream_si256(reinterpret_cast<__m256i*>(at), (__m256i)x.v[i]);
    if constexpr (sizeof(Vector) == 16) _mm_stream_si128(reinterpret_cast<__m128i*>(at), (__m128i)x.v[i]);
    if constexpr (sizeof(Vector) == 8) _mm_stream_si64(reinterpret_cast<long long*>(at), (long long)x.v[i]);
#else
    *at = x.v[i];
#endif
  }
}
TSAE_INLINE void finish_streaming() {
#if defined(__x86_64__)
  _mm_sfence();  // orders streaming stores before the plain stores that signal completion
#endif
}

template <class E>
TSAE_INLINE Pack<E> load_numbers(const void* from, int64_t at, int count) {
  return widen<E>(load<E>(static_cast<const E*>(from) + at, count));
}
template <class E>
TSAE_INLINE void store_numbers(void* to, int64_t at, const Pack<E>& x, int count) {
  store<E>(static_cast<E*>(to) + at, narrow<E>(x), count);
}

}  // namespace TSAE_TARGET
}  // namespace tsae
