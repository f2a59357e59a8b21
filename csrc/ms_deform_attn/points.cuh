// SPDX-License-Identifier: Apache-2.0
// Where a sampling point falls and how much it weighs, for all CUDA kernels of ms_deform_attn: eqs. (2) to (4), and
// (8) to (10) of the fused form, whose locations and weights exist in registers and shared memory only.
#pragma once

#include "ms_deform_attn/device.cuh"

namespace vitkern {

// What a kernel needs of an image, query and head besides its points. In the plain form nothing,
struct Plain {
  static constexpr bool kFused = false;
};

// in the fused form its reference point and the softmax, eq. (8): a weight is exp(logit - maximum) * scale.
template <typename A>
struct Fused {
  static constexpr bool kFused = true;
  const A* reference;  // of the image, query and first level
  A maximum, scale;
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

// 1 / (2 n) for a number of points, off by 2 units in the last place at most, without the branches of a division.
__device__ __forceinline__ float half_over(float n) { return __fdividef(0.5f, n); }
__device__ __forceinline__ double half_over(double n) {
  double x = half_over(static_cast<float>(n));
  for (int step = 0; step < 2; ++step) x = fma(x, fma(-2 * n, x, 1.0), x);  // Newton: twice the digits
  return x;
}

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

// By how much the location of a point moves along an axis (0: x, 1: y) for each 1 of its offset, where its
// reference is a box, eq. (10).
template <typename A>
__device__ __forceinline__ A box_step(const Task& task, const A* reference, int axis, uint32_t level) {
  const uint32_t end = task.ragged ? task.point_end[level] : task.points_per_level;
  const uint32_t begin = task.ragged && level > 0 ? task.point_end[level - 1] : 0;
  return __ldg(reference + 2 + axis) * half_over(static_cast<A>(end - begin));
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
