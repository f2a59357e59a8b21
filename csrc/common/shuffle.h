// SPDX-License-Identifier: Apache-2.0
// Operations that exchange lanes, on four vectors or four columns at a time.
#pragma once

#include "common/simd.h"

// Picks four lanes of two vectors of four.
#if defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 12)
#define VITKERN_SHUFFLE(A, B, ...) __builtin_shufflevector(A, B, __VA_ARGS__)
#elif defined(__GNUC__)
#define VITKERN_SHUFFLE(A, B, ...) __builtin_shuffle(A, B, (typename Vec<Integer<T>, 4>::Native){__VA_ARGS__})
#endif

namespace vitkern::VITKERN_ISA {
namespace {

// The sums of four vectors.
template <typename T, int N>
VITKERN_INLINE Vec<T, 4> sum_each(Vec<T, N> a, Vec<T, N> b, Vec<T, N> c, Vec<T, N> d) {
#if defined(VITKERN_SHUFFLE)
  if constexpr (N > 4) {
    return sum_each(add_halves(a), add_halves(b), add_halves(c), add_halves(d));
  } else if constexpr (N == 4) {
    const Vec<T, 4> ab = {VITKERN_SHUFFLE(a.v, b.v, 0, 4, 1, 5) + VITKERN_SHUFFLE(a.v, b.v, 2, 6, 3, 7)};
    const Vec<T, 4> cd = {VITKERN_SHUFFLE(c.v, d.v, 0, 4, 1, 5) + VITKERN_SHUFFLE(c.v, d.v, 2, 6, 3, 7)};
    return {VITKERN_SHUFFLE(ab.v, cd.v, 0, 1, 4, 5) + VITKERN_SHUFFLE(ab.v, cd.v, 2, 3, 6, 7)};
  }
#endif
  const T sums[4] = {sum(a), sum(b), sum(c), sum(d)};
  return load<T, 4>(sums);
}

// Row i of four numbers becomes number i of each of four columns.
template <typename T>
VITKERN_INLINE void split_columns(const T* rows, int64_t count, T* const (&columns)[4]) {
  int64_t i = 0;
#if defined(VITKERN_SHUFFLE)
  for (; i + 4 <= count; i += 4) {
    const auto a = load<T, 4>(rows + 4 * i).v, b = load<T, 4>(rows + 4 * i + 4).v;
    const auto c = load<T, 4>(rows + 4 * i + 8).v, d = load<T, 4>(rows + 4 * i + 12).v;
    const Vec<T, 4> ab_low = {VITKERN_SHUFFLE(a, b, 0, 4, 1, 5)},
                    ab_high = {VITKERN_SHUFFLE(a, b, 2, 6, 3, 7)};
    const Vec<T, 4> cd_low = {VITKERN_SHUFFLE(c, d, 0, 4, 1, 5)},
                    cd_high = {VITKERN_SHUFFLE(c, d, 2, 6, 3, 7)};
    store(columns[0] + i, Vec<T, 4>{VITKERN_SHUFFLE(ab_low.v, cd_low.v, 0, 1, 4, 5)});
    store(columns[1] + i, Vec<T, 4>{VITKERN_SHUFFLE(ab_low.v, cd_low.v, 2, 3, 6, 7)});
    store(columns[2] + i, Vec<T, 4>{VITKERN_SHUFFLE(ab_high.v, cd_high.v, 0, 1, 4, 5)});
    store(columns[3] + i, Vec<T, 4>{VITKERN_SHUFFLE(ab_high.v, cd_high.v, 2, 3, 6, 7)});
  }
#endif
  for (; i < count; ++i)
    for (int column = 0; column < 4; ++column) columns[column][i] = rows[4 * i + column];
}

}  // namespace
}  // namespace vitkern::VITKERN_ISA
