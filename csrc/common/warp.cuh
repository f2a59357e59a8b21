// SPDX-License-Identifier: Apache-2.0
// Operations of a whole warp whose lanes form teams of a power of two.
#pragma once

#include "common/launch.cuh"

namespace vitkern {

constexpr int kWarpLanes = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

// The first lane of the caller's team in its warp, and the bits of its lanes.
template <int kLanes>
__device__ __forceinline__ unsigned first_lane() {
  return threadIdx.x % kWarpLanes / kLanes * kLanes;
}
template <int kLanes>
__device__ __forceinline__ unsigned team_mask() {
  return (kWholeWarp >> (kWarpLanes - kLanes)) << first_lane<kLanes>();
}

// The lanes of the caller's team whose predicate holds, as bits of the warp. All of the warp must call it.
template <int kLanes>
__device__ __forceinline__ unsigned team_ballot(bool predicate) {
  return __ballot_sync(kWholeWarp, predicate) & team_mask<kLanes>();
}

// How many of `lanes` come before the caller.
__device__ __forceinline__ int count_before(unsigned lanes) {
  return __popc(lanes & ((1u << threadIdx.x % kWarpLanes) - 1));
}

// One number of each lane of the team combined, the same bits for all its lanes where the order of a pair
// does not matter. All of the warp must call it.
template <int kLanes, typename A, typename Combine>
__device__ __forceinline__ A team_reduce(A x, const Combine& combine) {
#pragma unroll
  for (int flip = kLanes / 2; flip > 0; flip /= 2) x = combine(x, __shfl_xor_sync(kWholeWarp, x, flip));
  return x;
}

// Sums kValues (a power of two) over the lanes of each team and leaves the sums spread over it: while there
// are values to halve, each step keeps half of them and hands the other half across, so the shuffles number
// about kValues + log2(kLanes) instead of kValues * log2(kLanes). Lane i then holds, in front, the sums of
// the values from i * kValues / kLanes on: one of them, or kValues / kLanes where the team is smaller. All of
// the warp must call it.
template <int kLanes, int kValues, typename A, int kSize>
__device__ __forceinline__ void scatter_sums(A (&values)[kSize]) {
  static_assert(kValues <= kSize);
  if constexpr (kLanes > 1) {
    constexpr int kHalfTeam = kLanes / 2, kKept = kValues > 1 ? kValues / 2 : 1;
    if constexpr (kValues > 1) {
      const bool upper = threadIdx.x & kHalfTeam;
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        const A kept = upper ? values[i + kKept] : values[i];
        const A given = upper ? values[i] : values[i + kKept];
        values[i] = kept + __shfl_xor_sync(kWholeWarp, given, kHalfTeam);
      }
    } else {
      values[0] += __shfl_xor_sync(kWholeWarp, values[0], kHalfTeam);
    }
    scatter_sums<kHalfTeam, kKept>(values);
  }
}

}  // namespace vitkern
