// SPDX-License-Identifier: Apache-2.0
// Arithmetic of sizes that the CPU kernels share.
#pragma once

#include "common/simd.h"

namespace vitkern::VITKERN_ISA {
namespace {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// So many numbers of accumulator type, up to whole vectors.
template <typename Acc>
int64_t whole_vectors(int64_t count) {
  return round_up(count, kLanes<Acc>);
}

}  // namespace
}  // namespace vitkern::VITKERN_ISA
