// SPDX-License-Identifier: Apache-2.0
// The factors of dropout, eqs. (4) and (5): Philox 4x32-10 (Salmon et al. 2011) on vectors of counters.
#pragma once

#include "adapter_bottleneck/params.h"
#include "common/simd.h"

namespace vitkern::VITKERN_ISA {
namespace {

constexpr int kCounters = kLanes<int64_t>;  // processed together
constexpr int kWords = 4;                   // random words of 32 bits from each counter

// Lanes of 64 bits; a product takes the lower 32.
using Words = Vec<uint64_t, kCounters>;

VITKERN_INLINE Words words(uint64_t x) { return broadcast<uint64_t, kCounters>(x); }

VITKERN_INLINE Words multiply_low_halves(Words a, Words b) {
#if VITKERN_VECTOR_EXTENSION && VITKERN_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return {(Words::Native)_mm512_mul_epu32((__m512i)a.v, (__m512i)b.v)};
#elif VITKERN_VECTOR_EXTENSION && VITKERN_VECTOR_BYTES == 32 && defined(__AVX2__)
  return {(Words::Native)_mm256_mul_epu32((__m256i)a.v, (__m256i)b.v)};
#else
  const auto low = words(0xffffffff);
  return (a & low) * (b & low);
#endif
}

// Word w of counter + lane, as the lower half of lane `lane` of output[w].
VITKERN_INLINE void philox(uint64_t key, uint64_t counter, Words (&output)[kWords]) {
  static constexpr uint64_t kNumbers[] = {0, 1, 2, 3, 4, 5, 6, 7};
  const auto half = words(32);
  const auto counters = load<uint64_t, kCounters>(kNumbers) + words(counter);
  output[0] = counters;
  output[1] = counters >> half;
  output[2] = output[3] = words(0);
  uint32_t low_key = static_cast<uint32_t>(key), high_key = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const Words left = multiply_low_halves(output[0], words(0xD2511F53));
    const Words right = multiply_low_halves(output[2], words(0xCD9E8D57));
    output[0] = (right >> half) ^ output[1] ^ words(low_key);
    output[1] = right;
    output[2] = (left >> half) ^ output[3] ^ words(high_key);
    output[3] = left;
    low_key += 0x9E3779B9;
    high_key += 0xBB67AE85;
  }
}

// The length of an array for `count` factors.
inline int64_t dropout_space(int64_t count) { return count + (kCounters + 1) * kWords; }

// Writes factors to the array `to`; returns the address of the factor of unit `first`, which the next ones follow.
template <typename Acc>
const Acc* dropout_factors(const Dropout& dropout, int64_t first, int64_t count, Acc* to) {
  const uint64_t key = static_cast<uint64_t>(*dropout.seed);
  const Acc rescale = static_cast<Acc>(dropout.rescale);
  const int64_t skipped = first % kWords;
  for (int64_t i = 0; i < count + skipped; i += kCounters * kWords) {
    Words vectors[kWords];
    philox(key, static_cast<uint64_t>((first - skipped + i) / kWords), vectors);
    uint64_t numbers[kWords][kCounters];
    for (int w = 0; w < kWords; ++w) store(numbers[w], vectors[w]);
    for (int c = 0; c < kCounters; ++c)
      for (int w = 0; w < kWords; ++w)
        to[i + c * kWords + w] = static_cast<uint32_t>(numbers[w][c]) < dropout.threshold ? Acc{0} : rescale;
  }
  return to + skipped;
}

}  // namespace
}  // namespace vitkern::VITKERN_ISA
