// SPDX-License-Identifier: Apache-2.0
// What the CUDA kernels of ms_deform_attn share: who works on what.
//
// Work split: the channels of one image, query and head belong to a team of neighbouring lanes, 16 bytes of
// value to each lane. Before a team walks through its points, each of its lanes works out the coordinates of
// one of them and leaves pixels and weights in shared memory: a point is located once, not once a channel.
#pragma once

#include <type_traits>

#include "common/vec.cuh"
#include "common/warp.cuh"
#include "ms_deform_attn/params.h"

namespace vitkern {

constexpr int kThreads = 256;
static_assert(kThreads % kWarpLanes == 0);

// Blocks of an SM that the registers must allow: half of the SM's threads with floats, a
// quarter with doubles.
template <typename T>
constexpr int kMinBlocks = sizeof(Accumulator<T>) == 4 ? 4 : 2;

// MsDeformAttnParams in the kernels' form, made by cuda.cu: sizes that were checked to fit 32 bits, and
// quotients that each thread would have to work out again. A Task that held the parameters themselves would be shorter,
// and costs the fused gather_grad_value of floats 51 registers for 48 on sm_80, 53 for 48 on sm_90: 50 % of the threads
// for 62 %.
struct Task {
  uint32_t pixels, heads, channels, levels, points;  // S, M, D, L, K
  uint32_t teams;                                    // of an image: rows * heads; rows are queries or pixels
  uint32_t blocks;                                   // of an image: what its teams need
  uint32_t pixel_step;                               // from pixel to pixel, in the unit of Corners::offset
  uint64_t point_reciprocal;                         // 2^64 / K rounded up, 0 for K = 1
  float levels_per_point, half_of_that;              // L / K where not ragged
  uint32_t points_per_level;                         // K / L where not ragged
  bool ragged, nearest, wide;                        // wide: coordinates in the accumulator type
  bool point_gradients;                              // any but that of value is wanted
  uint16_t point_end[kMaxRaggedLevels];              // as in MsDeformAttnParams
  const void *value, *locations, *weights, *grad_output;
  const int64_t *spatial_shapes, *level_start;
  Reference reference;
  uint32_t queries;  // Q
  void *output, *grad_value, *grad_locations, *grad_weights, *grad_computed;
};

// kChannels = 0 stands for any number of channels: 32 lanes with one channel each go over them in tiles.
template <typename T, int kChannels>
struct Team {
  static constexpr int kVector = kChannels ? kVectorBytes / int{sizeof(T)} : 1;  // channels of a lane
  static constexpr int kLanes = kChannels ? kChannels / kVector : kWarpLanes;
  static constexpr int kTile = kLanes * kVector;
  static constexpr int kPerBlock = kThreads / kLanes;
  static_assert(kLanes <= kWarpLanes && kWarpLanes % kLanes == 0);
};

// The fused form samples the nearest pixels, which is rare, through the kernels for any number of channels:
// without a second way through those for whole vectors the build is faster.
template <int kChannels, bool kFused>
constexpr bool kKnowsNearest = kChannels == 0 || !kFused;

// Which (image, row, head) the caller's team works on. Blocks do not straddle images. Teams beyond the last
// read along with it, for the sake of the warp's operations, and write nothing.
struct Place {
  uint32_t image, row, head;
  bool exists;
  int64_t index;  // of (image, row, head)
};

template <int kLanes>
__device__ __forceinline__ Place team_place(const Task& task) {
  Place place;
  place.image = blockIdx.x / task.blocks;
  const uint32_t block = blockIdx.x - place.image * task.blocks;
  const uint32_t wanted = block * (kThreads / kLanes) + threadIdx.x / kLanes;
  const uint32_t team = min(wanted, task.teams - 1);
  place.row = team / task.heads;
  place.head = team - place.row * task.heads;
  place.exists = wanted < task.teams;
  place.index = uint64_t{place.image} * task.teams + team;
  return place;
}

// Where an image and head begin in [B, S, M, D].
__device__ __forceinline__ int64_t first_pixel(const Task& task, const Place& place) {
  return (uint64_t{place.image} * task.pixels * task.heads + place.head) * task.channels;
}

// Locations and weights come in the type of value or in its accumulator, the same for the whole launch.
template <typename T>
__device__ __forceinline__ const void* coordinates_from(const void* data, int64_t index, bool wide) {
  const size_t bytes = wide || std::is_same_v<T, Accumulator<T>> ? sizeof(Accumulator<T>) : sizeof(T);
  return opaque(static_cast<const char*>(data) + index * bytes);
}

template <typename T>
__device__ __forceinline__ Accumulator<T> load_coordinate(const void* data, uint64_t index, bool wide) {
  if (wide || std::is_same_v<T, Accumulator<T>>)
    return __ldg(static_cast<const Accumulator<T>*>(data) + index);
  return widen(__ldg(static_cast<const T*>(data) + index));
}

template <typename T>
__device__ __forceinline__ void store_coordinate(void* data, int64_t index, bool wide, Accumulator<T> x) {
  if (wide) {
    static_cast<Accumulator<T>*>(data)[index] = x;
  } else {
    static_cast<T*>(data)[index] = narrow<T>(x);
  }
}

// Shared memory that the levels may take, beside the arrays that the kernels declare.
constexpr size_t kLevelBytes = 16 << 10;

template <typename... Declared>
constexpr bool leaves_room_for_levels = (sizeof(Declared) + ... + kLevelBytes) <= kSharedBytes;

// A level, read once a block into shared memory. Nothing can touch an empty one: -1 < x < -1 is never true.
template <typename A>
struct alignas(16) Level {
  A columns, rows;
  uint32_t first, stride;  // of its first pixel and from row to row, in the unit of Corners::offset
};

// A side of a level in pixels. Where A has no room for each of them, the last few are out of reach.
template <typename A>
__device__ __forceinline__ A side_of_level(int64_t pixels) {
  const A side = static_cast<A>(pixels);
  return sizeof(A) == sizeof(float) && pixels > 1 << 24 ? side * A(1 - 0x1p-22) : side;
}

// Returns whether all levels lie in value. One that does not is left empty.
template <typename A>
__device__ __forceinline__ bool load_levels(const Task& task, Level<A>* levels) {
  bool all_fit = true;
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < task.levels; i += kThreads) {
    const int64_t height = __ldg(task.spatial_shapes + 2 * i), width = __ldg(task.spatial_shapes + 2 * i + 1);
    const int64_t first = __ldg(task.level_start + i);
    // Sizes that are negative or leave the 31 bits of S cannot fit; without them the area cannot overflow.
    const bool small = static_cast<uint64_t>(height | width | first) <= 0x7fffffffu;
    // One without pixels may begin anywhere, and its other side may be of any length.
    const bool bare = (width == 0 && height >= 0) || (height == 0 && width >= 0);
    const bool fits = bare || (small && height * width + first <= task.pixels);
    const bool empty = bare || !fits;
    all_fit &= fits;
    levels[i] = {empty ? -1 : side_of_level<A>(width), empty ? -1 : side_of_level<A>(height),
                 static_cast<uint32_t>(first) * task.pixel_step,
                 static_cast<uint32_t>(width) * task.pixel_step};
  }
  return __syncthreads_and(all_fit);
}

// Half a point off the quotients' steps, which are 1 / K apart: exact for the K <= 2^20 that cuda.cu admits.
__device__ __forceinline__ uint32_t level_of_point(const Task& task, uint32_t point) {
  if (!task.ragged)
    return static_cast<uint32_t>(fma(static_cast<float>(point), task.levels_per_point, task.half_of_that));
  uint32_t level = 0;
  while (point >= task.point_end[level]) ++level;
  return level;
}

}  // namespace vitkern
