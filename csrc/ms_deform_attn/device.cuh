// SPDX-License-Identifier: Apache-2.0
// What the CUDA kernels of ms_deform_attn share: who works on what, and where a sampling point falls.
//
// Work split: the channels of one image, query and head belong to a team of neighbouring lanes, 16 bytes of value to
// each lane. Before a team walks through its points, each of its lanes works out the coordinates of one of them and
// leaves pixels and weights in shared memory: a point is located once, not once a channel.
#pragma once

#include <type_traits>

#include "common/vec.cuh"
#include "common/warp.cuh"
#include "ms_deform_attn/params.h"

namespace vitkern {

constexpr int kThreads = 256;
static_assert(kThreads % kWarpLanes == 0);

// Blocks of an SM that the registers must allow: half of the SM's threads with floats, a quarter with doubles.
template <typename T>
constexpr int kMinBlocks = sizeof(Accumulator<T>) == 4 ? 4 : 2;

// kChannels = 0 stands for any number of channels: 32 lanes with one channel each go over them in tiles.
template <typename T, int kChannels>
struct Team {
  static constexpr int kVector = kChannels ? kVectorBytes / int{sizeof(T)} : 1;  // channels of a lane
  static constexpr int kLanes = kChannels ? kChannels / kVector : kWarpLanes;
  static constexpr int kTile = kLanes * kVector;
  static constexpr int kPerBlock = kThreads / kLanes;
  static_assert(kLanes <= kWarpLanes && kWarpLanes % kLanes == 0);
};

// Which (image, row, head) the caller's team works on: rows are queries, or pixels where a pass gathers. Blocks do not
// straddle images. The launch has checked that rows * heads < 2^31 and that the grid has at most 2^31 - 1 blocks.
struct Place {
  uint32_t image, row, head;
  bool exists;    // teams beyond the last take part in the warp's operations, and in nothing else
  int64_t index;  // of (image, row, head)
};

template <int kLanes>
__device__ __forceinline__ Place team_place(int64_t rows, int64_t heads) {
  constexpr uint32_t kTeams = kThreads / kLanes;
  const uint32_t in_image = static_cast<uint32_t>(rows * heads), blocks = (in_image + kTeams - 1) / kTeams;
  Place place;
  place.image = blockIdx.x / blocks;
  const uint32_t in_block = (blockIdx.x - place.image * blocks) * kTeams + threadIdx.x / kLanes;
  place.row = in_block / static_cast<uint32_t>(heads);
  place.head = in_block - place.row * static_cast<uint32_t>(heads);
  place.exists = in_block < in_image;
  place.index = int64_t{place.image} * in_image + in_block;
  return place;
}

// Element `channel` of row `row` of an array [rows, row_bytes]. One multiplication reaches past 2^32 bytes.
template <typename T>
__device__ __forceinline__ T* at_row(T* first, uint32_t row, uint32_t row_bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(first) + uint64_t{row} * row_bytes);
}

// Locations and weights come in the type of value or in its accumulator, the same for the whole launch.
template <typename T>
__device__ __forceinline__ Accumulator<T> load_coordinate(const void* data, int64_t index, bool wide) {
  using A = Accumulator<T>;
  return wide ? __ldg(static_cast<const A*>(data) + index) : widen(__ldg(static_cast<const T*>(data) + index));
}

template <typename T>
__device__ __forceinline__ void store_coordinate(void* data, int64_t index, bool wide, Accumulator<T> x) {
  if (wide) {
    static_cast<Accumulator<T>*>(data)[index] = x;
  } else {
    static_cast<T*>(data)[index] = narrow<T>(x);
  }
}

template <typename T>
__device__ __forceinline__ bool wide_coordinates(const MsDeformAttnParams& p) {
  return sizeof(T) == sizeof(Accumulator<T>) || p.coord_dtype != p.value_dtype;
}

// The two pixels of a bilinear sample along one axis, their shares of it, and the shares' slopes, eqs. (3) and (7).
// Beyond the border there is no pixel: there the inner one stands in and both carry half of its share. So nothing is
// read that does not count, and no reader needs to ask.
template <typename A>
struct Axis {
  uint32_t pixel[2];
  A share[2], slope[2];
};

template <typename A>
__device__ __forceinline__ Axis<A> bilinear_axis(A x, int size) {
  const A left = floor(x), right_share = x - left;
  const int pixel = static_cast<int>(left);  // -1 .. size - 1
  Axis<A> axis{{uint32_t(pixel), uint32_t(pixel) + 1}, {1 - right_share, right_share}, {-1, 1}};
  if (pixel < 0) {
    axis = {{0, 0}, {right_share / 2, right_share / 2}, {A(0.5), A(0.5)}};
  } else if (pixel + 1 == size) {
    axis = {{axis.pixel[0], axis.pixel[0]}, {axis.share[0] / 2, axis.share[0] / 2}, {A(-0.5), A(-0.5)}};
  }
  return axis;
}

template <typename A>
__device__ __forceinline__ Axis<A> nearest_axis(A x, int size) {
  const uint32_t pixel = static_cast<uint32_t>(min(max(x, A(0)), A(size - 1)));
  return {{pixel, pixel}, {1, 0}, {0, 0}};
}

__device__ __forceinline__ float product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double product(double a, double b) { return __dmul_rn(a, b); }

// Where one sampling point falls, and its attention weight.
template <typename A>
struct Sample {
  bool touches;  // some pixel counts
  A weight;
  Axis<A> x, y;
  int width, height;
  int64_t first;  // the level's first pixel
  int level;
};

__device__ __forceinline__ int level_of_point(const MsDeformAttnParams& p, uint32_t point) {
  if (!p.ragged) return static_cast<int>(point / (static_cast<uint32_t>(p.points) / static_cast<uint32_t>(p.levels)));
  int level = 0;
  while (point >= p.point_end[level]) ++level;
  return level;
}

// Point `point` of the (image, query, head) with index `index`, eqs. (2) to (4). Every comparison with NaN is false:
// a location that is not a number touches nothing.
template <typename T>
__device__ __forceinline__ Sample<Accumulator<T>> locate(const MsDeformAttnParams& p, int64_t index, uint32_t point) {
  using A = Accumulator<T>;
  const bool wide = wide_coordinates<T>(p);
  const int64_t at = index * p.points + point;
  A x = load_coordinate<T>(p.locations, 2 * at, wide), y = load_coordinate<T>(p.locations, 2 * at + 1, wide);
  Sample<A> sample{};
  sample.weight = load_coordinate<T>(p.weights, at, wide);
  sample.level = level_of_point(p, point);
  const int64_t height = __ldg(p.spatial_shapes + 2 * sample.level);
  const int64_t width = __ldg(p.spatial_shapes + 2 * sample.level + 1);
  sample.first = __ldg(p.level_start + sample.level);
  // No size may be negative or leave the 31 bits that S has; then the area cannot overflow.
  const bool small = !((height | width | sample.first) >> 31);
  const bool fits = small && sample.first + height * width <= p.pixels;
  sample.width = static_cast<int>(width);
  sample.height = static_cast<int>(height);

  // The product is rounded before the shift, as in torch: the same location is in the same cell on every backend.
  x = product(x, static_cast<A>(sample.width));
  y = product(y, static_cast<A>(sample.height));
  const bool empty = width == 0 || height == 0;
  if (p.sampling == Sampling::kBilinear) {
    x -= A(0.5);
    y -= A(0.5);
    sample.touches = x > -1 && x < A(sample.width) && y > -1 && y < A(sample.height) && !empty && fits;
    if (sample.touches) {
      sample.x = bilinear_axis(x, sample.width);
      sample.y = bilinear_axis(y, sample.height);
    }
  } else {
    x += A(0.5);
    y += A(0.5);
    sample.touches = isfinite(x) && isfinite(y) && !empty && fits;
    if (sample.touches) {
      sample.x = nearest_axis(x, sample.width);
      sample.y = nearest_axis(y, sample.height);
    }
  }
  if (!fits) {
    // A level that reaches out of value: rather than fault, or drop its points in silence, the result is NaN.
    const A nan = A(NAN);
    sample.touches = true;
    sample.weight = nan;
    sample.x = sample.y = {{0, 0}, {nan, nan}, {nan, nan}};
    sample.first = 0;
  }
  return sample;
}

// What the lanes of a team need of a point: which pixels, and how much of each, eq. (1). Nearest uses the first only.
template <typename A>
struct alignas(16) Corners {
  A share[4];  // times the attention weight
  uint32_t pixel[4];
};

template <typename A>
__device__ __forceinline__ Corners<A> corners_of(const Sample<A>& sample) {
  Corners<A> corners;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    corners.share[i] = sample.weight * (sample.y.share[i / 2] * sample.x.share[i % 2]);
    corners.pixel[i] =
        static_cast<uint32_t>(sample.first) + sample.y.pixel[i / 2] * sample.width + sample.x.pixel[i % 2];
  }
  return corners;
}

// The points of a block's teams, one for each lane. The odd stride puts the points that neighbouring teams read at the
// same time into different banks.
template <typename T, int kChannels>
using StagedPoints =
    Corners<Accumulator<T>>[Team<T, kChannels>::kPerBlock][Team<T, kChannels>::kLanes + 1];

}  // namespace vitkern
