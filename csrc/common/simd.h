// SPDX-License-Identifier: Apache-2.0
// Vec<T, N>: a vector of N numbers, on any instruction set.
//
// GCC and Clang compile their vector extension to the target's instructions, and split vectors that are wider than its
// registers; other compilers get loops over an array. Everything here has internal linkage: the linker must never replace
// a function of one instruction set by its twin of another. For the same reason no std:: template is used.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"

#if defined(__AVX2__) || defined(__AVX512F__) || defined(_M_X64)
#include <immintrin.h>
#endif

#if defined(_MSC_VER) && !defined(__clang__)
#define VITKERN_INLINE __forceinline
#define VITKERN_INLINE_LAMBDA
#define VITKERN_VECTOR_EXTENSION 0
#else
#define VITKERN_INLINE inline __attribute__((always_inline))
#define VITKERN_INLINE_LAMBDA __attribute__((always_inline))  // behind the parameters of a lambda
#define VITKERN_VECTOR_EXTENSION 1
#endif

// Put before a loop over an array of vectors that should stay in registers: GCC otherwise turns a loop that fills it
// into a copy of memory.
#if defined(__GNUC__) && !defined(__clang__)
#define VITKERN_UNROLL _Pragma("GCC unroll 16")
#else
#define VITKERN_UNROLL
#endif

#if defined(__AVX512F__)
#define VITKERN_REGISTER_BYTES 64
#elif defined(__AVX2__)
#define VITKERN_REGISTER_BYTES 32
#else
#define VITKERN_REGISTER_BYTES 16
#endif

// Tests set it, to run the wide code on a chip that has only narrow registers.
#ifndef VITKERN_VECTOR_BYTES
#define VITKERN_VECTOR_BYTES VITKERN_REGISTER_BYTES
#endif

namespace vitkern::VITKERN_ISA {
namespace {

template <typename T>
constexpr int kLanes = VITKERN_VECTOR_BYTES / static_cast<int>(sizeof(T));

// The integers as wide as T: what comparisons give (all bits set = true), and indices that travel beside T.
template <typename T>
struct IntegerOf {
  using Type = int32_t;
};
template <>
struct IntegerOf<double> {
  using Type = int64_t;
};
template <>
struct IntegerOf<int64_t> {
  using Type = int64_t;
};
template <typename T>
using Integer = typename IntegerOf<T>::Type;

#if VITKERN_VECTOR_EXTENSION

template <typename T, int N>
struct Vec {
  typedef T Native __attribute__((vector_size(sizeof(T) * N)));
  typedef T InMemory __attribute__((vector_size(sizeof(T) * N), aligned(alignof(T)), may_alias));
  Native v;
};

template <typename T, int N>
VITKERN_INLINE Vec<T, N> broadcast(T x) {
  return {x - typename Vec<T, N>::Native{}};
}

#define VITKERN_ARITHMETIC(OP)                                     \
  template <typename T, int N>                                     \
  VITKERN_INLINE Vec<T, N> operator OP(Vec<T, N> a, Vec<T, N> b) { \
    return {a.v OP b.v};                                           \
  }
#define VITKERN_COMPARISON(OP)                                              \
  template <typename T, int N>                                              \
  VITKERN_INLINE Vec<Integer<T>, N> operator OP(Vec<T, N> a, Vec<T, N> b) { \
    return {(typename Vec<Integer<T>, N>::Native)(a.v OP b.v)};             \
  }

template <typename T, int N>
VITKERN_INLINE Vec<T, N> select(Vec<Integer<T>, N> mask, Vec<T, N> yes, Vec<T, N> no) {
  typedef typename Vec<Integer<T>, N>::Native Bits;
  return {(typename Vec<T, N>::Native)(((Bits)yes.v & mask.v) | ((Bits)no.v & ~mask.v))};
}

template <typename U, typename T, int N>
VITKERN_INLINE Vec<U, N> convert(Vec<T, N> a) {
  return {__builtin_convertvector(a.v, typename Vec<U, N>::Native)};
}

// Memory needs no alignment.
template <typename T, int N>
VITKERN_INLINE Vec<T, N> load(const T* from) {
  return {*reinterpret_cast<const typename Vec<T, N>::InMemory*>(from)};
}

template <typename T, int N>
VITKERN_INLINE void store(T* to, Vec<T, N> a) {
  *reinterpret_cast<typename Vec<T, N>::InMemory*>(to) = a.v;
}

#else

template <typename T, int N>
struct Vec {
  T v[N];
};

template <typename T, int N>
VITKERN_INLINE Vec<T, N> broadcast(T x) {
  Vec<T, N> r;
  for (int i = 0; i < N; ++i) r.v[i] = x;
  return r;
}

#define VITKERN_ARITHMETIC(OP)                                             \
  template <typename T, int N>                                             \
  VITKERN_INLINE Vec<T, N> operator OP(Vec<T, N> a, Vec<T, N> b) {         \
    for (int i = 0; i < N; ++i) a.v[i] = static_cast<T>(a.v[i] OP b.v[i]); \
    return a;                                                              \
  }
#define VITKERN_COMPARISON(OP)                                              \
  template <typename T, int N>                                              \
  VITKERN_INLINE Vec<Integer<T>, N> operator OP(Vec<T, N> a, Vec<T, N> b) { \
    Vec<Integer<T>, N> r;                                                   \
    for (int i = 0; i < N; ++i) r.v[i] = -(a.v[i] OP b.v[i]);               \
    return r;                                                               \
  }

template <typename T, int N>
VITKERN_INLINE Vec<T, N> select(Vec<Integer<T>, N> mask, Vec<T, N> yes, Vec<T, N> no) {
  for (int i = 0; i < N; ++i) no.v[i] = mask.v[i] ? yes.v[i] : no.v[i];
  return no;
}

template <typename U, typename T, int N>
VITKERN_INLINE Vec<U, N> convert(Vec<T, N> a) {
  Vec<U, N> r;
  for (int i = 0; i < N; ++i) r.v[i] = static_cast<U>(a.v[i]);
  return r;
}

template <typename T, int N>
VITKERN_INLINE Vec<T, N> load(const T* from) {
  Vec<T, N> r;
  memcpy(&r, from, sizeof r);
  return r;
}

template <typename T, int N>
VITKERN_INLINE void store(T* to, Vec<T, N> a) {
  memcpy(to, &a, sizeof a);
}

#endif

VITKERN_ARITHMETIC(+)
VITKERN_ARITHMETIC(-)
VITKERN_ARITHMETIC(*)
VITKERN_ARITHMETIC(/)
VITKERN_ARITHMETIC(&)
VITKERN_ARITHMETIC(|)
VITKERN_ARITHMETIC(^)
VITKERN_ARITHMETIC(>>)
VITKERN_ARITHMETIC(<<)
VITKERN_COMPARISON(<)
VITKERN_COMPARISON(>)
VITKERN_COMPARISON(>=)
VITKERN_COMPARISON(==)
#undef VITKERN_ARITHMETIC
#undef VITKERN_COMPARISON

// The same bits as numbers of another type: as many, half as many of twice the size, and so on.
template <typename U, typename T, int N>
VITKERN_INLINE auto bit_cast(Vec<T, N> a) {
  constexpr int count = N * static_cast<int>(sizeof(T)) / static_cast<int>(sizeof(U));
  Vec<U, count> r;
  static_assert(sizeof r == sizeof a, "a cast of bits keeps the size");
  memcpy(&r, &a, sizeof r);
  return r;
}

// The same numbers, which the compiler cannot fuse into a sum: for products that every chip must round in the same way.
template <typename T, int N>
VITKERN_INLINE Vec<T, N> rounded(Vec<T, N> a) {
#if VITKERN_VECTOR_EXTENSION && defined(__x86_64__) && VITKERN_VECTOR_BYTES <= VITKERN_REGISTER_BYTES
  asm("" : "+x"(a.v));
#elif VITKERN_VECTOR_EXTENSION
  asm("" : "+m"(a.v));
#endif
  return a;
}

// a * b + c; one instruction where there is one, as the compiler may contract.
template <typename T, int N>
VITKERN_INLINE Vec<T, N> multiply_add(Vec<T, N> a, Vec<T, N> b, Vec<T, N> c) {
  return a * b + c;
}

// Right for numbers that the integer can hold.
template <typename T, int N>
VITKERN_INLINE Vec<T, N> floor(Vec<T, N> a) {
  const Vec<T, N> truncated = convert<T>(convert<Integer<T>>(a));
  return select(truncated > a, truncated - broadcast<T, N>(1), truncated);
}

template <typename T, int N>
VITKERN_INLINE Vec<T, N / 2> add_halves(Vec<T, N> a) {
  Vec<T, N / 2> low, high;
  memcpy(&low, &a, sizeof low);
  memcpy(&high, reinterpret_cast<const char*>(&a) + sizeof low, sizeof high);
  return low + high;
}

template <typename T, int N>
VITKERN_INLINE T sum(Vec<T, N> a) {
  if constexpr (N > 1) {
    return sum(add_halves(a));
  } else {
    T x;
    memcpy(&x, &a, sizeof x);
    return x;
  }
}

template <typename T, int N>
VITKERN_INLINE Vec<T, N> maximum(Vec<T, N> a, Vec<T, N> b) {
  return select(a > b, a, b);
}

template <typename T, int N>
VITKERN_INLINE T largest_lane(Vec<T, N> a) {
  if constexpr (N > 1) {
    Vec<T, N / 2> low, high;
    memcpy(&low, &a, sizeof low);
    memcpy(&high, reinterpret_cast<const char*>(&a) + sizeof low, sizeof high);
    return largest_lane(maximum(low, high));
  } else {
    T x;
    memcpy(&x, &a, sizeof x);
    return x;
  }
}

// True in the lanes below `count`.
template <typename T, int N>
VITKERN_INLINE Vec<Integer<T>, N> first_lanes(int64_t count) {
  using Index = Integer<T>;
  static constexpr Index kNumbers[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  static_assert(N <= 16, "a table of lanes as long as the widest vector");
  return load<Index, N>(kNumbers) < broadcast<Index, N>(static_cast<Index>(count < N ? count : N));
}

// Hides the pointer's origin from the compiler.
template <typename T>
VITKERN_INLINE T* opaque(T* pointer) {
#if VITKERN_VECTOR_EXTENSION
  asm("" : "+r"(pointer));
#endif
  return pointer;
}

}  // namespace
}  // namespace vitkern::VITKERN_ISA
