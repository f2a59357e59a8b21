// SPDX-License-Identifier: Apache-2.0
// ms_deform_attn forward, eq. (1) of docs/derivations/ms_deform_attn.md.
//
// Work split: a team (device.cuh) makes the output of one image, query and head. In rounds of one point a lane, the
// lanes locate the points, the points that touch a pixel move together, and all lanes walk through them.
// Memory: locations and weights are read once and coalesced, value through L1 and L2, output written once.
// Numerics: sums in the accumulator type, in the order of the points; a pixel that does not count is not read.
#pragma once

#include "ms_deform_attn/device.cuh"

namespace vitkern {

// Stages the points in [first, first + kLanes) of the team that touch a pixel; returns how many there are.
template <typename T, int kLanes>
__device__ __forceinline__ int stage_touching(const MsDeformAttnParams& p, const Place& place, uint32_t first,
                                              Corners<Accumulator<T>>* points) {
  const uint32_t lane = threadIdx.x % kLanes, point = first + lane;
  Sample<Accumulator<T>> sample;
  sample.touches = false;
  if (place.exists && point < p.points) sample = locate<T>(p, place.index, point);
  const unsigned touching = team_ballot<kLanes>(sample.touches);
  __syncwarp();  // nobody reads the last round's points any more
  if (sample.touches) points[__popc(touching & ((1u << lane) - 1))] = corners_of(sample);
  __syncwarp();
  return __popc(touching);
}

// Adds `count` staged points to the lane's channels. Two at a time, to have eight loads under way.
template <int kCorners, int kVector, typename T>
__device__ __forceinline__ void add_points(const Corners<Accumulator<T>>* points, int count, const T* value,
                                           uint32_t row_bytes, Accumulator<T> (&sum)[kVector]) {
#pragma unroll 2
  for (int i = 0; i < count; ++i) {
    const Corners<Accumulator<T>> corners = points[i];
#pragma unroll
    for (int c = 0; c < kCorners; ++c) {
      Accumulator<T> pixel[kVector];
      load(at_row(value, corners.pixel[c], row_bytes), pixel);
#pragma unroll
      for (int j = 0; j < kVector; ++j) sum[j] = fma(corners.share[c], pixel[j], sum[j]);
    }
  }
}

template <typename T, int kChannels>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T>)
    ms_deform_attn_forward(const __grid_constant__ MsDeformAttnParams p) {
  using Split = Team<T, kChannels>;
  __shared__ StagedPoints<T, kChannels> staged;
  Corners<Accumulator<T>>* points = staged[threadIdx.x / Split::kLanes];
  const Place place = team_place<Split::kLanes>(p.queries, p.heads);
  const uint32_t lane = threadIdx.x % Split::kLanes, channels = static_cast<uint32_t>(p.channels);
  const uint32_t row_bytes = static_cast<uint32_t>(p.heads * p.channels * sizeof(T));

  for (uint32_t tile = 0; tile < (kChannels ? kChannels : channels); tile += Split::kTile) {
    const uint32_t channel = tile + lane * Split::kVector;
    const bool mine = place.exists && (kChannels || channel < channels);
    // Lanes without a channel look at the first one.
    const T* value = static_cast<const T*>(p.value) +
                     (int64_t{place.image} * p.pixels * p.heads + place.head) * p.channels + (mine ? channel : 0);
    Accumulator<T> sum[Split::kVector] = {};
    for (uint32_t first = 0; first < p.points; first += Split::kLanes) {
      const int count = stage_touching<T, Split::kLanes>(p, place, first, points);
      if (p.sampling == Sampling::kBilinear) {
        add_points<4>(points, count, value, row_bytes, sum);
      } else {
        add_points<1>(points, count, value, row_bytes, sum);
      }
    }
    if (mine) store(static_cast<T*>(p.output) + place.index * p.channels + channel, sum);
  }
}

}  // namespace vitkern
