// SPDX-License-Identifier: Apache-2.0
// grad_value without atomics, eq. (5), bit for bit the same each time ("Deterministic" in the derivation).
//
// Each point is filed under the last pixel that it touches, the one below and to the right; the caller sorts
// the points by it, stably. So a pixel finds its points under itself and its neighbours to the right, below,
// and both: two runs of the sorted order, for neighbours in a row are neighbours in it.
// Work split: a warp, as a team (device.cuh) of one channel a lane, owns one image, pixel and head. In rounds
// of one point a lane, the lanes locate the points of a run, those that touch the pixel move together, and
// all lanes add up their channels of grad_output.
// Numerics: each sum runs in the sorted order, whatever the schedule; NaN and infinities spread as
// in any sum.
#pragma once

#include "ms_deform_attn/points.cuh"

namespace vitkern {

constexpr int kFilingLanes = 16;  // of one image, query and head; one point at a time each

template <typename T, bool kFused>
__global__ void __launch_bounds__(kThreads)
    ms_deform_attn_cells(const __grid_constant__ Task task, int64_t* cells, int64_t none,
                         Accumulator<T>* softmax) {
  VITKERN_DYNAMIC_SHARED(Level<Accumulator<T>>, levels);
  load_levels(task, levels);
  const Place place = team_place<kFilingLanes>(task);
  const Form<T, kFused> form = form_of_team<T, kFused, kFilingLanes>(task, place);
  if (!place.exists) return;
  if constexpr (kFused) {
    if (threadIdx.x % kFilingLanes == 0) {  // all lanes have the same
      softmax[2 * place.index] = form.largest;
      softmax[2 * place.index + 1] = form.scale;
    }
  }
  const int64_t first = (uint64_t{place.image} * task.heads + place.head) * task.pixels;
  for (uint32_t point = threadIdx.x % kFilingLanes; point < task.points; point += kFilingLanes) {
    const auto sample = locate<T>(task, levels, form, true, point, task.nearest);
    const uint32_t last = sample.touches ? corners_of(task, sample, task.nearest).offset[3] : 0;
    cells[place.index * task.points + point] = sample.touches ? first + last : none;
  }
}

// The contribution of one point to a pixel: a share of one row of grad_output.
template <typename A>
struct alignas(16) Part {
  int64_t row;
  A share;
};

// The part of the point numbered `index` that the team's pixel takes as one of `level`; returns whether
// there is one.
template <typename T, bool kFused>
__device__ __forceinline__ bool part_of_pixel(const Task& task, const Level<Accumulator<T>>* levels,
                                              uint64_t index, const Accumulator<T>* softmax, uint32_t level,
                                              const Place& place, Part<Accumulator<T>>& part) {
  // A division by K: the reciprocal's error grows to a whole only beyond the 2^44 points that cuda.cu admits.
  part.row = task.point_reciprocal ? __umul64hi(index, task.point_reciprocal) : index;
  part.share = 0;
  const uint32_t point = static_cast<uint32_t>(index - part.row * task.points);
  if (level_of_point(task, point) != level) return false;  // levels that overlap share pixels
  const uint32_t in_image =
      static_cast<uint32_t>(part.row - int64_t{place.image} * task.queries * task.heads);
  Form<T, kFused> form = form_of_row<T, kFused>(task, place.image, in_image / task.heads, part.row);
  if constexpr (kFused) {
    form.largest = __ldg(softmax + 2 * part.row);
    form.scale = __ldg(softmax + 2 * part.row + 1);
  }
  const Sample<Accumulator<T>> sample = locate<T>(task, levels, form, true, point, task.nearest);
  if (!sample.touches) return false;
  const Corners<Accumulator<T>> corners = corners_of(task, sample, task.nearest);
  bool takes = false;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (corners.offset[i] != place.row || (task.nearest && i > 0)) continue;
    part.share += corners.share[i];
    takes = true;
  }
  return takes;
}

// Adds the points order[begin .. end) to the lane's channel. All of the warp calls it.
template <typename T, bool kFused, typename A = Accumulator<T>>
__device__ __forceinline__ void add_run(const Task& task, const Level<A>* levels, const int64_t* order,
                                        const A* softmax, int64_t begin, int64_t end, uint32_t level,
                                        const Place& place, const T* grad_output, Part<A>* parts, A& sum) {
  const uint32_t lane = threadIdx.x % kWarpLanes;
#pragma unroll 1
  for (; begin < end; begin += kWarpLanes) {
    Part<A> part;
    const bool takes =
        begin + lane < end &&
        part_of_pixel<T, kFused>(task, levels, __ldg(order + begin + lane), softmax, level, place, part);
    const unsigned takers = __ballot_sync(kWholeWarp, takes);
    __syncwarp();  // after the last read of the previous round's parts
    if (takes) parts[count_before(takers)] = part;
    __syncwarp();
    const int count = __popc(takers);
#pragma unroll 2
    for (int i = 0; i < count; ++i)
      sum = fma(parts[i].share, widen(__ldg(grad_output + parts[i].row * task.channels)), sum);
  }
}

template <typename T, bool kFused>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T>)
    ms_deform_attn_gather_grad_value(const __grid_constant__ Task task, const int64_t* order,
                                     const int64_t* first, const Accumulator<T>* softmax) {
  using A = Accumulator<T>;
  __shared__ Part<A> staged[kThreads / kWarpLanes][kWarpLanes];
  static_assert(leaves_room_for_levels<decltype(staged)>);
  VITKERN_DYNAMIC_SHARED(Level<A>, levels);
  load_levels(task, levels);
  Part<A>* parts = staged[threadIdx.x / kWarpLanes];
  const Place place = team_place<kWarpLanes>(task);
  const int64_t* first_of_pixel =
      first + (uint64_t{place.image} * task.heads + place.head) * task.pixels + place.row;

  for (uint32_t tile = 0; tile < task.channels; tile += kWarpLanes) {
    const uint32_t channel = tile + threadIdx.x % kWarpLanes;
    const bool mine = place.exists && channel < task.channels;
    const T* grad_output = static_cast<const T*>(task.grad_output) + (mine ? channel : 0);
    A sum = 0;
    for (uint32_t level = 0; level < task.levels; ++level) {
      const uint32_t in_level = place.row - levels[level].first, width = levels[level].stride;
      const uint32_t area = levels[level].rows > 0 ? width * static_cast<uint32_t>(levels[level].rows) : 0;
      const bool inside = place.exists && in_level < area;
      const bool last_column = inside && (in_level + 1) % width == 0;
#pragma unroll 1
      for (uint32_t down = 0; down < 2; ++down) {
        const bool any = inside && in_level + down * width < area;
        const int64_t* run = first_of_pixel + down * width;
        add_run<T, kFused>(task, levels, order, softmax, any ? run[0] : 0, any ? run[last_column ? 1 : 2] : 0,
                           level, place, grad_output, parts, sum);
      }
    }
    if (mine) static_cast<A*>(task.grad_value)[place.index * task.channels + channel] = sum;
  }
}

}  // namespace vitkern
