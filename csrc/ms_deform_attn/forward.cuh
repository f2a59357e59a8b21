// SPDX-License-Identifier: Apache-2.0
// ms_deform_attn forward, eq. (1) of docs/derivations/ms_deform_attn.md.
//
// Work split: a team (device.cuh) makes the output of one image, query and head. In rounds of one
// point a lane, the lanes locate the points, the points that touch a pixel move together, and all
// lanes walk through them.
// Memory: locations and weights are read once and coalesced, value through L1 and L2, output written once.
// Numerics: sums in the accumulator type, in the order of the points; a pixel that does not count
// is not read.
#pragma once

#include "ms_deform_attn/points.cuh"

namespace vitkern {

// Stages the points in [first, first + kLanes) of the team that touch a pixel; returns how many there are.
template <typename T, int kLanes, typename AnyForm>
__device__ __forceinline__ int stage_touching(const Task& task, const Level<Accumulator<T>>* levels,
                                              const Place& place, const AnyForm& form, uint32_t point,
                                              bool nearest, Corners<Accumulator<T>>* points) {
  const bool mine = point < (place.exists ? task.points : 0);
  const Sample<Accumulator<T>> sample = locate<T>(task, levels, form, mine, mine ? point : 0, nearest);
  const unsigned touching = team_ballot<kLanes>(sample.touches);
  __syncwarp();  // after the last read of the previous round's points
  if (sample.touches) points[count_before(touching)] = corners_of(task, sample, nearest);
  __syncwarp();
  return __popc(touching);
}

// Adds the pixels of kPoints neighbouring points to the lane's channels, with all loads under way at once.
template <int kPoints, int kCorners, int kVector, typename T>
__device__ __forceinline__ void add_points(const Corners<Accumulator<T>>* points, const T* value,
                                           Accumulator<T> (&sum)[kVector]) {
#pragma unroll
  for (int i = 0; i < kPoints; ++i) {
    const Corners<Accumulator<T>> corners = points[i];
#pragma unroll
    for (int c = 0; c < kCorners; ++c) {
      Accumulator<T> pixel[kVector];
      load_vector(value, corners.offset[c], pixel);
#pragma unroll
      for (int j = 0; j < kVector; ++j) sum[j] = fma(corners.share[c], pixel[j], sum[j]);
    }
  }
}

template <typename T, int kChannels, bool kNearest, typename AnyForm>
__device__ __forceinline__ void forward_team(const Task& task, const Level<Accumulator<T>>* levels,
                                             bool all_fit, const Place& place, const AnyForm& form,
                                             Corners<Accumulator<T>>* points) {
  using Split = Team<T, kChannels>;
  // Two points at a time, to have eight loads under way, where the registers for eight channels leave
  // room for it.
  constexpr int kAtOnce = Split::kVector > 4 ? 1 : 2, kCorners = kNearest ? 1 : 4;
  const uint32_t lane = threadIdx.x % Split::kLanes;
  for (uint32_t tile = 0; tile < (kChannels ? kChannels : task.channels); tile += Split::kTile) {
    const uint32_t channel = tile + lane * Split::kVector;
    const bool mine = place.exists && (kChannels || channel < task.channels);
    // Lanes without a channel look at the first one.
    const T* value = static_cast<const T*>(task.value) + first_pixel(task, place) + (mine ? channel : 0);
    Accumulator<T> sum[Split::kVector];
#pragma unroll
    for (auto& one : sum) one = all_fit ? 0 : NAN;
    uint32_t point = lane;
#pragma unroll 1
    for (uint32_t first = 0; first < task.points; first += Split::kLanes, point += Split::kLanes) {
      const int count = stage_touching<T, Split::kLanes>(task, levels, place, form, point, kNearest, points);
      const Corners<Accumulator<T>>*next = points, *end = points + count;
#pragma unroll 1
      for (; next < end - (kAtOnce - 1); next += kAtOnce) add_points<kAtOnce, kCorners>(next, value, sum);
      if (kAtOnce > 1 && next < end) add_points<1, kCorners>(next, value, sum);
    }
    if (mine) store(static_cast<T*>(task.output) + place.index * task.channels + channel, sum);
  }
}

template <typename T, int kChannels, bool kFused>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T>)
    ms_deform_attn_forward(const __grid_constant__ Task task) {
  using Split = Team<T, kChannels>;
  // One point a lane; the odd stride puts what neighbouring teams read at the same time into different banks.
  __shared__ Corners<Accumulator<T>> staged[Split::kPerBlock][Split::kLanes + 1];
  static_assert(leaves_room_for_levels<decltype(staged)>);
  VITKERN_DYNAMIC_SHARED(Level<Accumulator<T>>, levels);
  const bool all_fit = load_levels(task, levels);
  levels = opaque_shared(levels);
  Corners<Accumulator<T>>* points = opaque_shared(staged[threadIdx.x / Split::kLanes]);
  const Place place = team_place<Split::kLanes>(task);
  const Form<T, kFused> form = form_of_team<T, kFused, Split::kLanes>(task, place);
  if (kKnowsNearest<kChannels, kFused> && task.nearest) {
    forward_team<T, kChannels, true>(task, levels, all_fit, place, form, points);
  } else {
    forward_team<T, kChannels, false>(task, levels, all_fit, place, form, points);
  }
}

}  // namespace vitkern
