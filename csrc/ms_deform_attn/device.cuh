// SPDX-License-Identifier: Apache-2.0
// What the CUDA kernels of ms_deform_attn share: who works on what, and where a sampling point falls.
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

// Blocks of an SM that the registers must allow: half of the SM's threads with floats, a quarter with
// doubles.
template <typename T>
constexpr int kMinBlocks = sizeof(Accumulator<T>) == 4 ? 4 : 2;

// MsDeformAttnParams as the kernels want them, made by cuda.cu: sizes that were checked to fit 32 bits, and
// quotients that each thread would have to work out again.
struct Task {
  uint32_t pixels, heads, channels, levels, points;  // S, M, D, L, K
  uint32_t teams;                                    // of an image: rows * heads; rows are queries or pixels
  uint32_t blocks;                                   // of an image: what its teams need
  uint32_t pixel_vectors;                // of a pixel and all its heads, Team::kVector channels each
  uint64_t point_reciprocal;             // 2^64 / K rounded up, 0 for K = 1
  float levels_per_point;                // L / K where not ragged
  uint32_t points_per_level;             // K / L where not ragged
  bool ragged, nearest, wide;            // wide: coordinates in the accumulator type
  uint16_t point_end[kMaxRaggedLevels];  // as in MsDeformAttnParams
  const void *value, *locations, *weights, *grad_output;
  const int64_t *spatial_shapes, *level_start;
  Reference reference;
  uint32_t queries;  // Q
  void *output, *grad_value, *grad_locations, *grad_weights, *grad_places;
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

// Which (image, row, head) the caller's team works on. Blocks do not straddle images.
struct Place {
  uint32_t image, row, head;
  bool exists;    // teams beyond the last take part in the warp's operations, and in nothing else
  int64_t index;  // of (image, row, head)
};

template <int kLanes>
__device__ __forceinline__ Place team_place(const Task& task) {
  Place place;
  place.image = blockIdx.x / task.blocks;
  const uint32_t block = blockIdx.x - place.image * task.blocks;
  const uint32_t team = block * (kThreads / kLanes) + threadIdx.x / kLanes;
  place.row = team / task.heads;
  place.head = team - place.row * task.heads;
  place.exists = team < task.teams;
  place.index = uint64_t{place.image} * task.teams + team;
  return place;
}

// Where an image and head begin in [B, S, M, D].
__device__ __forceinline__ int64_t first_pixel(const Task& task, const Place& place) {
  return (uint64_t{place.image} * task.pixels * task.heads + place.head) * task.channels;
}

// Locations and weights come in the type of value or in its accumulator, the same for the whole launch.
template <typename T>
__device__ __forceinline__ Accumulator<T> load_coordinate(const void* data, int64_t index, bool wide) {
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

// What a kernel needs of an image, query and head besides its points: nothing in the plain form,
struct Plain {
  static constexpr bool kFused = false;
};

// in the fused form these.
template <typename A>
struct Fused {
  static constexpr bool kFused = true;
  const A* reference;  // of the image and query
  A maximum, scale;    // of the softmax, eq. (8): a weight is exp(logit - maximum) * scale
};

template <typename A>
__device__ __forceinline__ const A* reference_of(const Task& task, uint32_t image, uint32_t query) {
  return static_cast<const A*>(task.reference.points) + image * task.reference.batch_stride +
         query * task.reference.query_stride;
}

// For a whole team, whose lanes share the points. All of the warp must call it.
template <typename T, int kLanes, typename A = Accumulator<T>>
__device__ __forceinline__ Fused<A> fused_of_team(const Task& task, const Place& place) {
  const int64_t first = place.index * task.points;
  const uint32_t lane = threadIdx.x % kLanes, end = place.exists ? task.points : 0;
  A maximum = -INFINITY, sum = 0;
#pragma unroll 1
  for (uint32_t point = lane; point < end; point += kLanes)
    maximum = max(maximum, load_coordinate<T>(task.weights, first + point, task.wide));
  maximum = team_reduce<kLanes>(maximum, [](A a, A b) { return max(a, b); });
#pragma unroll 1
  for (uint32_t point = lane; point < end; point += kLanes)
    sum += exp(load_coordinate<T>(task.weights, first + point, task.wide) - maximum);
  sum = team_reduce<kLanes>(sum, [](A a, A b) { return a + b; });
  return {reference_of<A>(task, place.image, place.row), maximum, 1 / sum};
}

template <typename T, bool kFused>
using Form = std::conditional_t<kFused, Fused<Accumulator<T>>, Plain>;

template <typename T, bool kFused, int kLanes>
__device__ __forceinline__ Form<T, kFused> form_of_team(const Task& task, const Place& place) {
  if constexpr (kFused) {
    return fused_of_team<T, kLanes>(task, place);
  } else {
    return {};
  }
}

template <typename T, typename AnyForm>
__device__ __forceinline__ Accumulator<T> weight_of_point(const Task& task, const AnyForm& form,
                                                          int64_t index) {
  Accumulator<T> weight = load_coordinate<T>(task.weights, index, task.wide);
  if constexpr (AnyForm::kFused) weight = exp(weight - form.maximum) * form.scale;
  return weight;
}

// The two pixels of a sample along one axis, their shares of it, and the shares' slopes, eqs. (3) and (7).
// Beyond the border there is no pixel: there the inner one stands in and both carry half of its share. So
// nothing is read that does not count, and no reader needs to ask.
template <typename A>
struct Axis {
  int pixel[2];
  A share[2], slope[2];
};

template <typename A>
__device__ __forceinline__ Axis<A> bilinear_axis(A x, int size) {
  const A left = floor(x), right_share = x - left;
  const int pixel = static_cast<int>(left);  // -1 .. size - 1
  Axis<A> axis{{max(pixel, 0), min(pixel + 1, size - 1)}, {1 - right_share, right_share}, {-1, 1}};
  if (axis.pixel[0] == axis.pixel[1]) {
    axis.share[0] = axis.share[1] = A(0.5) * (pixel < 0 ? axis.share[1] : axis.share[0]);
    axis.slope[0] = axis.slope[1] = pixel < 0 ? A(0.5) : A(-0.5);
  }
  return axis;
}

template <typename A>
__device__ __forceinline__ Axis<A> nearest_axis(A x, int size) {
  // The bound is rounded where size has more digits than A.
  const int pixel = min(static_cast<int>(min(max(x, A(0)), A(size - 1))), size - 1);
  return {{pixel, pixel}, {1, 0}, {0, 0}};
}

// Rounded before anything is added, as in torch: a location on the edge of a cell falls to its side.
__device__ __forceinline__ float product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double product(double a, double b) { return __dmul_rn(a, b); }

// The fast division of floats is off by 2 units in the last place at most, and exact where b is a power of two.
__device__ __forceinline__ float quotient(float a, float b) { return __fdividef(a, b); }
__device__ __forceinline__ double quotient(double a, double b) { return a / b; }

// Where one sampling point falls, and its attention weight.
template <typename A>
struct Sample {
  bool touches;  // some pixel counts
  A weight;
  A column, row;  // as a real number, counted from pixel centre to pixel centre
  Axis<A> x, y;
  int width, height;
  uint32_t level, first;  // first pixel of the level
};

// A level, read once a block into shared memory. Of an empty one nothing can be touched: -1 < x < -1 is never
// true.
struct alignas(16) Level {
  int width, height;
  uint32_t first;
  uint32_t fits;  // whether all of it lies in value
};

__device__ __forceinline__ void load_levels(const Task& task, Level* levels) {
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < task.levels; i += kThreads) {
    const int64_t height = __ldg(task.spatial_shapes + 2 * i), width = __ldg(task.spatial_shapes + 2 * i + 1);
    const int64_t first = __ldg(task.level_start + i);
    // Sizes that are negative or leave the 31 bits of S cannot fit; without them the area cannot overflow.
    const bool small = static_cast<uint64_t>(height | width | first) <= 0x7fffffffu;
    const bool fits = small && height * width + first <= task.pixels, empty = width == 0 || height == 0;
    levels[i] = {empty ? -1 : static_cast<int>(width), empty ? -1 : static_cast<int>(height),
                 static_cast<uint32_t>(first), fits};
  }
  __syncthreads();
}

// Half a point off the quotients' steps, which are 1 / K apart: exact for the K <= 2^20 that cuda.cu admits.
__device__ __forceinline__ uint32_t level_of_point(const Task& task, uint32_t point) {
  if (!task.ragged) return static_cast<uint32_t>((static_cast<float>(point) + 0.5f) * task.levels_per_point);
  uint32_t level = 0;
  while (point >= task.point_end[level]) ++level;
  return level;
}

// By how much the location of a point moves along an axis (0: x, 1: y) for each 1 of its offset, where its
// reference is a box, eq. (10).
template <typename A>
__device__ __forceinline__ A box_step(const Task& task, const A* reference, int axis, uint32_t level) {
  const uint32_t end = task.ragged ? task.point_end[level] : task.points_per_level;
  const uint32_t begin = task.ragged && level > 0 ? task.point_end[level - 1] : 0;
  return __ldg(reference + 2 + axis) * quotient(A(0.5), static_cast<A>(end - begin));
}

// A point's coordinate along an axis in pixels, from the level's edge on; `x` is its location or, in the fused
// form, its offset. The products are rounded before they are added to, as in torch: the same point is in the
// same cell on every backend.
template <typename AnyForm, typename A>
__device__ __forceinline__ A in_pixels(const Task& task, const AnyForm& form, int axis, uint32_t level, A x,
                                       A size) {
  if constexpr (!AnyForm::kFused) {
    return product(x, size);
  } else {
    const A* reference = form.reference + level * task.reference.level_stride;
    const A centre = __ldg(reference + axis);
    if (task.reference.numbers == 2) return product(centre, size) + x;
    return product(centre + product(x, box_step(task, reference, axis, level)), size);
  }
}

// Point `point` of its query and head, number `index` of all, eqs. (2) to (4) and (8) to (10). Every comparison
// with NaN is false: a location that is not a number touches nothing.
template <typename T, typename AnyForm>
__device__ __forceinline__ Sample<Accumulator<T>> locate(const Task& task, const Level* levels,
                                                         const AnyForm& form, int64_t index, uint32_t point,
                                                         bool nearest) {
  using A = Accumulator<T>;
  A x = load_coordinate<T>(task.locations, 2 * index, task.wide);
  A y = load_coordinate<T>(task.locations, 2 * index + 1, task.wide);
  Sample<A> sample;
  sample.weight = weight_of_point<T>(task, form, index);
  sample.level = level_of_point(task, point);
  Level level = levels[sample.level];
  x = in_pixels(task, form, 0, sample.level, x, static_cast<A>(level.width));
  y = in_pixels(task, form, 1, sample.level, y, static_cast<A>(level.height));
  if (!level.fits) {
    // Rather than fault, or drop the points in silence, the result is NaN: the first pixel counts with that
    // weight.
    level = {1, 1, 0, 1};
    sample.weight = A(NAN);
    x = y = A(0.5);
  }
  sample.width = level.width;
  sample.height = level.height;
  sample.first = level.first;

  const A columns = static_cast<A>(sample.width), rows = static_cast<A>(sample.height);
  x += nearest ? A(0.5) : A(-0.5);
  y += nearest ? A(0.5) : A(-0.5);
  const bool near = nearest ? isfinite(x) && isfinite(y) : x > -1 && x < columns && y > -1 && y < rows;
  sample.column = x;
  sample.row = y;
  sample.touches = nearest ? near && sample.width > 0 : near;
  if (sample.touches) {
    sample.x = nearest ? nearest_axis(x, sample.width) : bilinear_axis(x, sample.width);
    sample.y = nearest ? nearest_axis(y, sample.height) : bilinear_axis(y, sample.height);
  }
  return sample;
}

// What the lanes of a team need of a point: which pixels, and how much of each, eq. (1). Nearest uses the
// first only.
template <typename A>
struct alignas(16) Corners {
  A share[4];          // times the attention weight
  uint32_t vector[4];  // where the pixels begin, counted in vectors from the first of the image and head
};

template <typename A>
__device__ __forceinline__ uint32_t pixel_of(const Sample<A>& sample, int down, int along) {
  return sample.first + sample.y.pixel[down] * sample.width + sample.x.pixel[along];
}

template <typename A>
__device__ __forceinline__ Corners<A> corners_of(const Task& task, const Sample<A>& sample) {
  Corners<A> corners;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    corners.share[i] = sample.weight * sample.y.share[i / 2] * sample.x.share[i % 2];
    corners.vector[i] = pixel_of(sample, i / 2, i % 2) * task.pixel_vectors;
  }
  return corners;
}

}  // namespace vitkern
