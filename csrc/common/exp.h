// SPDX-License-Identifier: Apache-2.0
// The exponential function on vectors, for the softmax: of numbers that are not positive.
//
// e^x = 2^n e^r with whole n and |r| <= ln(2) / 2, where the Taylor series to degree kDegree is as exact as
// the type. Relative error: 2e-7 in float, 4e-16 in double. Exactly 0 where the result would be subnormal.
#pragma once

#include "common/simd.h"

namespace vitkern::VITKERN_ISA {
namespace {

template <typename T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr int kDegree = 7;
  static constexpr int32_t kMantissaBits = 23, kBias = 127;
  static constexpr float kSmallest = -87.33654f;   // ln of the smallest normal number
  static constexpr float kLn2High = 0.693359375f;  // so short that its product with n is exact
  static constexpr float kLn2Low = -2.12194440e-4f;
};

template <>
struct ExpConstants<double> {
  static constexpr int kDegree = 13;
  static constexpr int64_t kMantissaBits = 52, kBias = 1023;
  static constexpr double kSmallest = -708.3964185322641;
  static constexpr double kLn2High = 6.93145751953125e-1;
  static constexpr double kLn2Low = 1.42860682030941723212e-6;
};

// Coefficients of the Taylor series: 1 / k!
template <typename T>
struct Taylor {
  T coefficient[ExpConstants<T>::kDegree + 1];
  constexpr Taylor() : coefficient{} {
    double inverse_factorial = 1;
    for (int k = 0; k <= ExpConstants<T>::kDegree; ++k) {
      coefficient[k] = static_cast<T>(inverse_factorial);
      inverse_factorial /= k + 1;
    }
  }
};

template <typename T, int N>
VITKERN_INLINE Vec<T, N> exp_nonpositive(Vec<T, N> x) {
  using Constants = ExpConstants<T>;
  using Index = Integer<T>;
  constexpr Taylor<T> taylor;
  // Added to a small number, this leaves its whole part in the lowest bits.
  const auto rounder = broadcast<T, N>(T(1.5) * static_cast<T>(Index{1} << Constants::kMantissaBits));
  const auto rounded = multiply_add(x, broadcast<T, N>(T(1.4426950408889634)), rounder);
  const auto whole = rounded - rounder;
  const auto rest =
      x - whole * broadcast<T, N>(Constants::kLn2High) - whole * broadcast<T, N>(Constants::kLn2Low);
  auto series = broadcast<T, N>(taylor.coefficient[Constants::kDegree]);
  for (int k = Constants::kDegree - 1; k >= 0; --k)
    series = multiply_add(series, rest, broadcast<T, N>(taylor.coefficient[k]));
  const auto bits = broadcast<Index, N>(Constants::kMantissaBits);
  const auto power = bit_cast<T>((bit_cast<Index>(rounded) + broadcast<Index, N>(Constants::kBias)) << bits);
  return select(x < broadcast<T, N>(Constants::kSmallest), broadcast<T, N>(0), series * power);
}

}  // namespace
}  // namespace vitkern::VITKERN_ISA
