// SPDX-License-Identifier: Apache-2.0
// Activations on vectors with their gradients: relu, gelu with erf, silu. Infinities and NaN give the results of
// torch's formulas.
#pragma once

#include <math.h>

#include "adapter_bottleneck/params.h"
#include "common/exp.h"

namespace vitkern::VITKERN_ISA {
namespace {

// x P(x^2) near zero, 1 - e^(|x| Q(|x|)) elsewhere. Relative error: 2e-7.
template <int N>
VITKERN_INLINE Vec<float, N> error_function(Vec<float, N> x) {
  constexpr float kSplit = 0.927734375f;
  constexpr float kNear[] = {-5.96761703e-4f, 4.99119423e-3f,  -2.67681349e-2f,
                             1.12819925e-1f,  -3.76125336e-1f, 1.28379166e-1f};
  constexpr float kFar[] = {-1.72853470e-5f, 3.83197126e-4f,  -3.88396438e-3f, 2.42546219e-2f,
                            -1.06777877e-1f, -6.34846687e-1f, -1.28717512e-1f};
  const auto zero = broadcast<float, N>(0);
  const auto size = select(x < zero, zero - x, x);
  const auto square = x * x;
  auto near = broadcast<float, N>(kNear[0]);
  for (int k = 1; k < 6; ++k) near = multiply_add(near, square, broadcast<float, N>(kNear[k]));
  near = multiply_add(near, x, x);
  auto exponent = broadcast<float, N>(kFar[0]);
  for (int k = 1; k < 7; ++k) exponent = multiply_add(exponent, size, broadcast<float, N>(kFar[k]));
  const auto rest = exp_nonpositive(multiply_add(exponent, size, zero - size));
  const auto one = broadcast<float, N>(1);
  const auto far = select(x < zero, rest - one, one - rest);
  return select(size > broadcast<float, N>(kSplit), far, near);
}

template <int N>
VITKERN_INLINE Vec<double, N> error_function(Vec<double, N> x) {
  double numbers[N];
  store(numbers, x);
  for (double& number : numbers) number = erf(number);
  return load<double, N>(numbers);
}

// The normal distribution up to x.
template <typename T, int N>
VITKERN_INLINE Vec<T, N> normal_share(Vec<T, N> x) {
  const auto erf_of = error_function(x * broadcast<T, N>(T(0.70710678118654752)));
  return broadcast<T, N>(T(0.5)) * (broadcast<T, N>(1) + erf_of);
}

template <typename T, int N>
VITKERN_INLINE Vec<T, N> logistic(Vec<T, N> x) {
  const auto zero = broadcast<T, N>(0), one = broadcast<T, N>(1);
  const auto power = exp_nonpositive(select(x > zero, zero - x, x));
  return select(x > zero, one, power) / (one + power);
}

template <Activation kActivation, typename T, int N>
VITKERN_INLINE Vec<T, N> activate(Vec<T, N> z) {
  const auto zero = broadcast<T, N>(0);
  if constexpr (kActivation == Activation::kRelu) return select(zero >= z, zero, z);
  if constexpr (kActivation == Activation::kGelu) return z * normal_share(z);
  if constexpr (kActivation == Activation::kSilu) return z * logistic(z);
}

// The gradient times the derivative at z.
template <Activation kActivation, typename T, int N>
VITKERN_INLINE Vec<T, N> activate_backward(Vec<T, N> z, Vec<T, N> gradient) {
  const auto zero = broadcast<T, N>(0), one = broadcast<T, N>(1);
  if constexpr (kActivation == Activation::kRelu) return select(zero >= z, zero, gradient);
  if constexpr (kActivation == Activation::kGelu) {
    const auto bell = exp_nonpositive(z * z * broadcast<T, N>(T(-0.5)));
    const auto density = bell * broadcast<T, N>(T(0.39894228040143268));
    return gradient * multiply_add(z, density, normal_share(z));
  }
  if constexpr (kActivation == Activation::kSilu) {
    const auto share = logistic(z);
    return gradient * share * multiply_add(z, one - share, one);
  }
}

// Calls run(constant) with the activation as constant.value.
template <Activation kActivation>
struct ActivationConstant {
  static constexpr Activation value = kActivation;
};

template <typename Run>
void dispatch_activation(Activation activation, const Run& run) {
  switch (activation) {
    case Activation::kRelu:
      return run(ActivationConstant<Activation::kRelu>{});
    case Activation::kGelu:
      return run(ActivationConstant<Activation::kGelu>{});
    case Activation::kSilu:
      return run(ActivationConstant<Activation::kSilu>{});
  }
}

}  // namespace
}  // namespace vitkern::VITKERN_ISA
