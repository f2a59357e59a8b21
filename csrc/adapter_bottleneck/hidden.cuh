// SPDX-License-Identifier: Apache-2.0
// Activation and dropout of the hidden units between the two products, with their derivative: eq. (2) of
// docs/derivations/adapter_bottleneck.md.
#pragma once

#include "adapter_bottleneck/params.h"
#include "common/block_product.cuh"

namespace vitkern {

// phi(z). NaN fails the comparisons and passes through.
template <typename A>
__device__ __forceinline__ A activate(Activation kind, A z) {
  if (kind == Activation::kRelu) return z <= 0 ? A{0} : z;
  if (kind == Activation::kGelu) return A{0.5} * z * (1 + erf(z * A{0.70710678118654752}));
  return z / (1 + exp(-z));
}

// The gradient of z from `grad`, the gradient of phi(z). As in torch, a relu that is off passes nothing, not even
// NaN.
template <typename A>
__device__ __forceinline__ A activate_backward(Activation kind, A z, A grad) {
  if (kind == Activation::kRelu) return z <= 0 ? A{0} : grad;
  if (kind == Activation::kGelu)
    return grad * (A{0.5} * (1 + erf(z * A{0.70710678118654752})) +
                   z * A{0.39894228040143268} * exp(A{-0.5} * z * z));
  const A sigmoid = 1 / (1 + exp(-z));
  return grad * sigmoid * (1 + z * (1 - sigmoid));
}

struct Words {
  uint32_t at[4];
};

// Philox 4x32-10 of key `seed` and counter (low, high, 0, 0), eq. (4).
__device__ __forceinline__ Words philox(uint64_t seed, uint64_t counter) {
  Words w = {{static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0}};
  uint32_t key[] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t left = uint64_t{w.at[0]} * 0xD2511F53u, right = uint64_t{w.at[2]} * 0xCD9E8D57u;
    w = {{static_cast<uint32_t>(right >> 32) ^ w.at[1] ^ key[0], static_cast<uint32_t>(right),
          static_cast<uint32_t>(left >> 32) ^ w.at[3] ^ key[1], static_cast<uint32_t>(left)}};
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return w;
}

// d of eq. (5), for hidden units i and i + 1.
template <typename A>
struct PairOfFactors {
  A first, second;
};

template <typename A>
__device__ __forceinline__ PairOfFactors<A> dropout_factors(const Dropout& dropout, int64_t i) {
  if (!dropout.seed) return {1, 1};
  const uint64_t seed = static_cast<uint64_t>(__ldg(dropout.seed));
  const A stays = static_cast<A>(dropout.rescale);
  const auto factor = [&](const Words& words, int which) {
    // Selected by comparisons: an index at run time would move the words to local memory.
    const uint32_t low = which & 1 ? words.at[1] : words.at[0], high = which & 1 ? words.at[3] : words.at[2];
    return (which & 2 ? high : low) < dropout.threshold ? A{0} : stays;
  };
  Words words = philox(seed, static_cast<uint64_t>(i) / 4);
  const A first = factor(words, i & 3);
  if ((i & 3) == 3) words = philox(seed, static_cast<uint64_t>(i) / 4 + 1);
  return {first, factor(words, (i + 1) & 3)};
}

// s of eq. (3).
template <typename A>
__device__ __forceinline__ A scale_of(const AdapterBottleneckParams& p) {
  const A factor = static_cast<A>(p.factor);
  return p.scale ? factor * __ldg(static_cast<const A*>(p.scale)) : factor;
}

// Element i of an optional vector.
template <typename T>
__device__ __forceinline__ Accumulator<T> number_or_zero(const void* vector, int64_t i) {
  return vector ? widen(__ldg(static_cast<const T*>(vector) + i)) : Accumulator<T>{0};
}

}  // namespace vitkern
