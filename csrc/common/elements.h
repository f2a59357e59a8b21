// SPDX-License-Identifier: Apache-2.0
// Numbers as they are stored (float, double, half, bfloat16) and as they are computed with (float, double).
//
// 16-bit numbers are widened exactly and rounded to nearest even, subnormals included; NaN stays NaN.
#pragma once

#include "common/prefetch.h"
#include "common/simd.h"

namespace vitkern::VITKERN_ISA {
namespace {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename T>
struct AccumulatorOf {
  using Type = float;
};
template <>
struct AccumulatorOf<double> {
  using Type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::Type;

template <int N>
VITKERN_INLINE Vec<int32_t, N> constant(int32_t x) {
  return broadcast<int32_t, N>(x);
}

template <int N>
VITKERN_INLINE Vec<float, N> widen(BFloat16, Vec<uint16_t, N> bits) {
  return bit_cast<float>(convert<int32_t>(bits) << constant<N>(16));
}

template <int N>
VITKERN_INLINE Vec<float, N> widen(Half, Vec<uint16_t, N> half) {
#if VITKERN_VECTOR_EXTENSION && defined(__AVX512F__)
  if constexpr (N == 16) return {(typename Vec<float, N>::Native)_mm512_cvtph_ps((__m256i)half.v)};
#endif
#if VITKERN_VECTOR_EXTENSION && defined(__F16C__)
  if constexpr (N == 8) return {(typename Vec<float, N>::Native)_mm256_cvtph_ps((__m128i)half.v)};
#endif
  const auto bits = convert<int32_t>(half);
  const auto magnitude = bits & constant<N>(0x7fff);
  const auto sign = (bits & constant<N>(0x8000)) << constant<N>(16);
  // Exponent biased by 15 -> 127, or all ones for infinity and NaN; a subnormal is a multiple of 2^-24.
  const auto rebias =
      select(magnitude >= constant<N>(0x7c00), constant<N>(224 << 23), constant<N>(112 << 23));
  const auto normal = (magnitude << constant<N>(13)) + rebias;
  const auto subnormal = bit_cast<int32_t>(convert<float>(magnitude) * broadcast<float, N>(0x1p-24f));
  return bit_cast<float>(select(magnitude >= constant<N>(0x0400), normal, subnormal) | sign);
}

template <int N>
VITKERN_INLINE Vec<uint16_t, N> narrow(BFloat16, Vec<float, N> x) {
  const auto bits = bit_cast<int32_t>(x);
  const auto magnitude = bits & constant<N>(0x7fffffff);
  const auto odd = (bits >> constant<N>(16)) & constant<N>(1);
  const auto rounded = bits + constant<N>(0x7fff) + odd;
  const auto quiet_nan = bits | constant<N>(0x00400000);
  return convert<uint16_t>(select(magnitude > constant<N>(0x7f800000), quiet_nan, rounded) >>
                           constant<N>(16));
}

template <int N>
VITKERN_INLINE Vec<uint16_t, N> narrow(Half, Vec<float, N> x) {
#if VITKERN_VECTOR_EXTENSION && defined(__AVX512F__)
  if constexpr (N == 16) return {(typename Vec<uint16_t, N>::Native)_mm512_cvtps_ph((__m512)x.v, 0)};
#endif
#if VITKERN_VECTOR_EXTENSION && defined(__F16C__)
  if constexpr (N == 8) return {(typename Vec<uint16_t, N>::Native)_mm256_cvtps_ph((__m256)x.v, 0)};
#endif
  const auto bits = bit_cast<int32_t>(x);
  const auto magnitude = bits & constant<N>(0x7fffffff);
  const auto sign = (bits >> constant<N>(16)) & constant<N>(0x8000);
  const auto odd = (magnitude >> constant<N>(13)) & constant<N>(1);
  const auto normal = (magnitude - constant<N>(112 << 23) + constant<N>(0xfff) + odd) >> constant<N>(13);
  // Adding 0.5 leaves the multiple of 2^-24 in the low bits, rounded by the addition itself.
  const auto shifted = bit_cast<float>(magnitude) + broadcast<float, N>(0.5f);
  const auto subnormal = bit_cast<int32_t>(shifted) - bit_cast<int32_t>(broadcast<float, N>(0.5f));
  auto half = select(magnitude >= constant<N>(113 << 23), normal, subnormal);
  half = select(magnitude >= constant<N>(0x477ff000), constant<N>(0x7c00), half);  // from 65520 on
  half = select(magnitude > constant<N>(0x7f800000), constant<N>(0x7e00), half);
  return convert<uint16_t>(half | sign);
}

// N stored numbers as accumulators.
template <int N, typename T>
VITKERN_INLINE Vec<Accumulator<T>, N> load_wide(const T* from) {
  if constexpr (sizeof(T) == 2) {
    return widen<N>(T{}, load<uint16_t, N>(&from->bits));
  } else {
    return load<T, N>(from);
  }
}

// Twice as many numbers: those at even places, and those at odd places, without a shuffle. Rows may begin at any number,
// so numbers are loaded: memcpy to a vector of pairs would go through memory, which takes five times as long.
template <int N>
VITKERN_INLINE void load_pairs(const BFloat16* from, Vec<float, N>& even, Vec<float, N>& odd) {
  const auto bits = bit_cast<int32_t>(load<uint16_t, 2 * N>(&from->bits));  // even places are the low halves
  even = bit_cast<float>(bits << constant<N>(16));
  odd = bit_cast<float>(bits & constant<N>(-0x10000));
}

// Back in their order.
template <int N>
VITKERN_INLINE void store_pairs(float* to, Vec<float, N> even, Vec<float, N> odd) {
  float evens[N], odds[N];
  store(evens, even);
  store(odds, odd);
  for (int i = 0; i < N; ++i) {
    to[2 * i] = evens[i];
    to[2 * i + 1] = odds[i];
  }
}

template <int N, typename T>
VITKERN_INLINE void store_narrow(T* to, Vec<Accumulator<T>, N> a) {
  if constexpr (sizeof(T) == 2) {
    store(&to->bits, narrow<N>(T{}, a));
  } else {
    store(to, a);
  }
}

// Arrays of any length: whole vectors, then fours (a query often has four points), then the rest in one padded vector.
template <typename T>
void widen_array(const T* from, int64_t count, Accumulator<T>* to) {
  constexpr int N = kLanes<Accumulator<T>>;
  int64_t i = 0;
  for (; i + N <= count; i += N) store(to + i, load_wide<N>(from + i));
  for (; i + 4 <= count; i += 4) store(to + i, load_wide<4>(from + i));
  if (i == count) return;
  T padded[N] = {};
  memcpy(padded, from + i, (count - i) * sizeof(T));
  Accumulator<T> wide[N];
  store(wide, load_wide<N>(padded));
  memcpy(to + i, wide, (count - i) * sizeof wide[0]);
}

template <typename T>
void narrow_array(const Accumulator<T>* from, int64_t count, T* to) {
  constexpr int N = kLanes<Accumulator<T>>;
  int64_t i = 0;
  for (; i + N <= count; i += N) store_narrow<N>(to + i, load<Accumulator<T>, N>(from + i));
  for (; i + 4 <= count; i += 4) store_narrow<4>(to + i, load<Accumulator<T>, 4>(from + i));
  if (i == count) return;
  Accumulator<T> padded[N] = {};
  memcpy(padded, from + i, (count - i) * sizeof padded[0]);
  T narrowed[N];
  store_narrow<N>(narrowed, load<Accumulator<T>, N>(padded));
  memcpy(to + i, narrowed, (count - i) * sizeof(T));
}

}  // namespace
}  // namespace vitkern::VITKERN_ISA
