// SPDX-License-Identifier: Apache-2.0
// grad_value without atomics, eq. (5), bit for bit the same each time ("Deterministic" in the derivation).
//
// Each point is filed under the last pixel that it touches, the one below and to the right; the caller sorts
// the points by it, stably. So a pixel finds its points under itself and its neighbours to the right, below,
// and both: two runs of the sorted order, for neighbours in a row are neighbours in it.
// Work split: a team (device.cuh) owns one image, pixel and head. In rounds of one point a lane, the lanes
// locate the points of a run, those that touch the pixel move together, and all lanes add up their channels
// of grad_output.
// Numerics: each sum runs in the sorted order, whatever the schedule; NaN and infinities spread as in any
// sum.
#pragma once

#include "ms_deform_attn/points.cuh"

namespace vitkern {

constexpr int kFilingLanes = 16;  // of one image, query and head; one point at a time each

template <typename T, bool kFused>
__global__ void __launch_bounds__(kThreads)
    ms_deform_attn_cells(const __grid_constant__ Task task, int64_t* cells, int64_t none,
                         Accumulator<T>* softmax) {
  VITKERN_DYNAMIC_SHARED(Level, levels);
  load_levels(task, levels);
  const Place place = team_place<kFilingLanes>(task);
  const auto form = form_of_team<T, kFused, kFilingLanes>(task, place);
  if (!place.exists) return;
  if constexpr (kFused) {
    softmax[2 * place.index] = form.maximum;
    softmax[2 * place.index + 1] = form.scale;
  }
  const int64_t first = (uint64_t{place.image} * task.heads + place.head) * task.pixels;
  for (uint32_t point = threadIdx.x % kFilingLanes; point < task.points; point += kFilingLanes) {
    const int64_t index = place.index * task.points + point;
    const Sample<Accumulator<T>> sample = locate<T>(task, levels, form, index, point, task.nearest);
    cells[index] = sample.touches ? first + pixel_of(sample, 1, 1) : none;
  }
}

// What a pixel takes of one point: a share of one row of grad_output.
template <typename A>
struct alignas(16) Part {
  int64_t row;
  A share;
};

// The form of the image, query and head that are number `row` of all, with the softmax that the cells' kernel has
// left.
template <typename T, bool kFused>
__device__ __forceinline__ Form<T, kFused> form_of_row(const Task& task, const Accumulator<T>* softmax,
                                                       uint32_t image, uint64_t row) {
  if constexpr (kFused) {
    const uint32_t in_image = static_cast<uint32_t>(row - uint64_t{image} * task.queries * task.heads);
    return {reference_of<Accumulator<T>>(task, image, in_image / task.heads), __ldg(softmax + 2 * row),
            __ldg(softmax + 2 * row + 1)};
  } else {
    return {};
  }
}

// The part of the point numbered `index` that the team's pixel takes as one of `level`; returns whether there is
// one.
template <typename T, bool kFused>
__device__ __forceinline__ bool part_of_pixel(const Task& task, const Level* levels, uint64_t index,
                                              const Accumulator<T>* softmax, uint32_t level,
                                              const Place& place, Part<Accumulator<T>>& part) {
  // A division by K: the reciprocal's error grows to a whole only beyond the 2^44 points that cuda.cu admits.
  part.row = task.point_reciprocal ? __umul64hi(index, task.point_reciprocal) : index;
  part.share = 0;
  const uint32_t point = static_cast<uint32_t>(index - part.row * task.points);
  const Form<T, kFused> form = form_of_row<T, kFused>(task, softmax, place.image, part.row);
  const Sample<Accumulator<T>> sample = locate<T>(task, levels, form, index, point, task.nearest);
  // Levels that overlap share pixels, and a point must not be counted once for each.
  if (!sample.touches || sample.level != level) return false;
  bool takes = false;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (pixel_of(sample, i / 2, i % 2) != place.row) continue;
    part.share += sample.weight * sample.y.share[i / 2] * sample.x.share[i % 2];
    takes = true;
  }
  return takes;
}

// Adds the points order[begin .. end) to the lane's channels. All of the warp calls it, each team with its
// own run.
template <typename T, bool kFused, int kLanes, int kVector>
__device__ __forceinline__ void add_run(const Task& task, const Level* levels, const int64_t* order,
                                        const Accumulator<T>* softmax, int64_t begin, int64_t end,
                                        uint32_t level, const Place& place, const T* grad_output,
                                        Part<Accumulator<T>>* parts, Accumulator<T> (&sum)[kVector]) {
  const uint32_t lane = threadIdx.x % kLanes;
  for (; __any_sync(kWholeWarp, begin < end); begin += kLanes) {
    Part<Accumulator<T>> part;
    const bool takes =
        begin + lane < end &&
        part_of_pixel<T, kFused>(task, levels, __ldg(order + begin + lane), softmax, level, place, part);
    const unsigned takers = team_ballot<kLanes>(takes);
    __syncwarp();  // nobody reads the last round's parts any more
    if (takes) parts[__popc(takers & ((1u << lane) - 1))] = part;
    __syncwarp();
    const int count = __popc(takers);
#pragma unroll 2
    for (int i = 0; i < count; ++i) {
      Accumulator<T> grad[kVector];
      load(grad_output + parts[i].row * task.channels, grad);
#pragma unroll
      for (int j = 0; j < kVector; ++j) sum[j] = fma(parts[i].share, grad[j], sum[j]);
    }
  }
}

template <typename T, int kChannels, bool kFused>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T>)
    ms_deform_attn_gather_grad_value(const __grid_constant__ Task task, const int64_t* order,
                                     const int64_t* first, const Accumulator<T>* softmax) {
  using A = Accumulator<T>;
  using Split = Team<T, kChannels>;
  __shared__ Part<A> staged[Split::kPerBlock][Split::kLanes + 1];  // banks as in forward
  VITKERN_DYNAMIC_SHARED(Level, levels);
  load_levels(task, levels);
  Part<A>* parts = staged[threadIdx.x / Split::kLanes];
  const Place place = team_place<Split::kLanes>(task);
  const uint32_t lane = threadIdx.x % Split::kLanes;
  const int64_t* first_of_pixel =
      first + (uint64_t{place.image} * task.heads + place.head) * task.pixels + place.row;

  for (uint32_t tile = 0; tile < (kChannels ? kChannels : task.channels); tile += Split::kTile) {
    const uint32_t channel = tile + lane * Split::kVector;
    const bool mine = place.exists && (kChannels || channel < task.channels);
    const T* grad_output = static_cast<const T*>(task.grad_output) + (mine ? channel : 0);
    A sum[Split::kVector] = {};
    for (uint32_t level = 0; level < task.levels; ++level) {
      const uint32_t in_level = place.row - levels[level].first, width = levels[level].width;
      const uint32_t area = width * levels[level].height;
      const bool inside = place.exists && levels[level].fits && levels[level].width > 0 && in_level < area;
      const bool last_column = inside && (in_level + 1) % width == 0;
#pragma unroll 1
      for (uint32_t down = 0; down < 2; ++down) {
        const bool any = inside && in_level + down * width < area;
        const int64_t* run = first_of_pixel + down * width;
        add_run<T, kFused, Split::kLanes>(task, levels, order, softmax, any ? run[0] : 0,
                                          any ? run[last_column ? 1 : 2] : 0, level, place, grad_output,
                                          parts, sum);
      }
    }
    if (mine) store(static_cast<A*>(task.grad_value) + place.index * task.channels + channel, sum);
  }
}

}  // namespace vitkern
