// SPDX-License-Identifier: Apache-2.0
// grad_value without atomics, eq. (5), bit for bit the same each time ("Deterministic" in the derivation).
//
// Each point is filed under the last pixel that it touches, the one below and to the right; the caller sorts the
// points by it, stably. So a pixel finds its points under itself and its neighbours to the right, below, and both:
// two runs of the sorted order, for neighbours in a row are neighbours in it.
// Work split: a team (device.cuh) owns one image, pixel and head. In rounds of one point a lane, the lanes locate
// the points of a run, those that touch the pixel move together, and all lanes add up their channels of grad_output.
// Numerics: each sum runs in the sorted order, whatever the schedule; NaN and infinities spread as in any sum.
#pragma once

#include "ms_deform_attn/device.cuh"

namespace vitkern {

// One thread files one point.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    ms_deform_attn_cells(const __grid_constant__ MsDeformAttnParams p, int64_t* cells) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, teams = p.batch * p.queries * p.heads;
  if (i >= teams * p.points) return;
  const int64_t index = i / p.points, image = index / (p.queries * p.heads), head = index % p.heads;
  const Sample<Accumulator<T>> sample = locate<T>(p, index, static_cast<uint32_t>(i - index * p.points));
  const int64_t pixel = sample.first + int64_t{sample.y.pixel[1]} * sample.width + sample.x.pixel[1];
  cells[i] = sample.touches ? (image * p.heads + head) * p.pixels + pixel : p.batch * p.heads * p.pixels;
}

// What a pixel takes of one point: a share of one row of grad_output.
template <typename A>
struct alignas(16) Part {
  int64_t row;
  A share;
};

// The part of the point numbered `point` that `pixel` of `level` takes; returns whether there is one.
template <typename T>
__device__ __forceinline__ bool part_of_pixel(const MsDeformAttnParams& p, int64_t point, int level, uint32_t pixel,
                                              Part<Accumulator<T>>& part) {
  part.row = point / p.points;
  part.share = 0;
  const Sample<Accumulator<T>> sample =
      locate<T>(p, part.row, static_cast<uint32_t>(point - part.row * p.points));
  const Corners<Accumulator<T>> corners = corners_of(sample);
  bool takes = false;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    if (corners.pixel[c] != pixel || (c > 0 && p.sampling == Sampling::kNearest)) continue;
    part.share += corners.share[c];
    takes = true;
  }
  // Levels that overlap share pixels, and a point must not be counted once for each.
  return takes && sample.level == level;
}

// Adds the points order[begin .. end) to the lane's channels. All of the warp calls it, each team with its own run.
template <typename T, int kLanes, int kVector>
__device__ __forceinline__ void add_run(const MsDeformAttnParams& p, const int64_t* order, int64_t begin, int64_t end,
                                        int level, uint32_t pixel, const T* grad_output,
                                        Part<Accumulator<T>>* parts, Accumulator<T> (&sum)[kVector]) {
  const uint32_t lane = threadIdx.x % kLanes;
  for (; __any_sync(kWholeWarp, begin < end); begin += kLanes) {
    Part<Accumulator<T>> part;
    const bool takes =
        begin + lane < end && part_of_pixel<T>(p, __ldg(order + begin + lane), level, pixel, part);
    const unsigned takers = team_ballot<kLanes>(takes);
    __syncwarp();  // nobody reads the last round's parts any more
    if (takes) parts[__popc(takers & ((1u << lane) - 1))] = part;
    __syncwarp();
    const int count = __popc(takers);
    for (int i = 0; i < count; ++i) {
      Accumulator<T> grad[kVector];
      load(grad_output + parts[i].row * p.channels, grad);
#pragma unroll
      for (int j = 0; j < kVector; ++j) sum[j] = fma(parts[i].share, grad[j], sum[j]);
    }
  }
}

template <typename T, int kChannels>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T>)
    ms_deform_attn_gather_grad_value(const __grid_constant__ MsDeformAttnParams p, const int64_t* order,
                                     const int64_t* first) {
  using A = Accumulator<T>;
  using Split = Team<T, kChannels>;
  __shared__ Part<A> staged[Split::kPerBlock][Split::kLanes + 1];
  Part<A>* parts = staged[threadIdx.x / Split::kLanes];
  const Place place = team_place<Split::kLanes>(p.pixels, p.heads);
  const uint32_t lane = threadIdx.x % Split::kLanes, channels = static_cast<uint32_t>(p.channels);
  const int64_t* first_of_pixel = first + (int64_t{place.image} * p.heads + place.head) * p.pixels + place.row;

  for (uint32_t tile = 0; tile < (kChannels ? kChannels : channels); tile += Split::kTile) {
    const uint32_t channel = tile + lane * Split::kVector;
    const bool mine = place.exists && (kChannels || channel < channels);
    const T* grad_output = static_cast<const T*>(p.grad_output) + (mine ? channel : 0);
    A sum[Split::kVector] = {};
    for (int level = 0; level < p.levels; ++level) {
      const int64_t height = __ldg(p.spatial_shapes + 2 * level), width = __ldg(p.spatial_shapes + 2 * level + 1);
      const int64_t in_level = place.row - __ldg(p.level_start + level);
      const bool inside = place.exists && in_level >= 0 && in_level < height * width;
      const bool last_column = inside && (in_level + 1) % width == 0;
      for (int down = 0; down < 2; ++down) {
        const bool any = inside && in_level + down * width < height * width;
        const int64_t* run = first_of_pixel + (any ? down * width : 0);
        add_run<T, Split::kLanes>(p, order, any ? run[0] : 0, any ? run[last_column ? 1 : 2] : 0, level, place.row,
                                  grad_output, parts, sum);
      }
    }
    if (mine) store(static_cast<A*>(p.grad_value) + place.index * p.channels + channel, sum);
  }
}

}  // namespace vitkern
