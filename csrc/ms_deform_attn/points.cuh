// SPDX-License-Identifier: Apache-2.0
// Where a sampling point falls and how much it weighs, for all CUDA kernels of ms_deform_attn: eqs.
// (2) to (4), and (8) to (10) of the fused form, whose locations and weights exist in registers and
// shared memory only.
#pragma once

#include "ms_deform_attn/device.cuh"

namespace vitkern {

// The points of an image, query and head. In the plain form their locations and weights,
struct Plain {
  static constexpr bool kFused = false;
  const void *locations, *weights;
};

// in the fused form offsets and logits, a reference point, and the softmax, eq. (8): a weight is
// exp(logit - largest) * scale.
template <typename A>
struct Fused {
  static constexpr bool kFused = true;
  const void *locations, *weights;
  const A* reference;  // of the image, query and first level
  A largest, scale;
};

template <typename T, bool kFused>
using Form = std::conditional_t<kFused, Fused<Accumulator<T>>, Plain>;

// Number `row` of all images, queries and heads, without its softmax.
template <typename T, bool kFused>
__device__ __forceinline__ Form<T, kFused> form_of_row(const Task& task, uint32_t image, uint32_t query,
                                                       int64_t row) {
  using A = Accumulator<T>;
  const int64_t first = row * task.points;
  Form<T, kFused> form{};
  form.locations = coordinates_from<T>(task.locations, 2 * first, task.wide);
  form.weights = coordinates_from<T>(task.weights, first, task.wide);
  if constexpr (kFused)
    form.reference = static_cast<const A*>(task.reference.points) + image * task.reference.batch_stride +
                     query * task.reference.query_stride;
  return form;
}

// For a whole team, whose lanes share the points. All of the warp must call it.
template <typename T, bool kFused, int kLanes, typename A = Accumulator<T>>
__device__ __forceinline__ Form<T, kFused> form_of_team(const Task& task, const Place& place) {
  Form<T, kFused> form = form_of_row<T, kFused>(task, place.image, place.row, place.index);
  if constexpr (kFused) {
    const uint32_t lane = threadIdx.x % kLanes, end = place.exists ? task.points : 0;
    A largest = -INFINITY, sum = 0;
#pragma unroll 1
    for (uint32_t point = lane; point < end; point += kLanes)
      largest = max(largest, load_coordinate<T>(form.weights, point, task.wide));
    largest = team_reduce<kLanes>(largest, [](A a, A b) { return max(a, b); });
#pragma unroll 1
    for (uint32_t point = lane; point < end; point += kLanes)
      sum += exp(load_coordinate<T>(form.weights, point, task.wide) - largest);
    sum = team_reduce<kLanes>(sum, [](A a, A b) { return a + b; });
    form.largest = largest;
    form.scale = 1 / sum;
  }
  return form;
}

template <typename T, typename AnyForm>
__device__ __forceinline__ Accumulator<T> weight_of_point(const Task& task, const AnyForm& form,
                                                          uint32_t point) {
  Accumulator<T> weight = load_coordinate<T>(form.weights, point, task.wide);
  if constexpr (AnyForm::kFused) weight = exp(weight - form.largest) * form.scale;
  return weight;
}

// The two pixels of a sample along one axis, their shares of it, and the shares' slopes, eqs. (3) and (7).
// Beyond the border there is no pixel: there the inner one stands in and both carry half of its share. So
// nothing is read that does not count, and no reader needs to ask.
template <typename A>
struct Axis {
  int pixel;
  bool edge;  // the second pixel is the first one too, else the next one
  A share[2], slope[2];
};

template <typename A>
__device__ __forceinline__ Axis<A> bilinear_axis(A x, A size) {
  const A left = floor(x), right_share = x - left, left_share = 1 - right_share;
  const bool before = left < 0, edge = before || left >= size - 1;
  const A half = A(0.5) * (before ? right_share : left_share), half_slope = before ? A(0.5) : A(-0.5);
  return {max(static_cast<int>(left), 0),
          edge,
          {edge ? half : left_share, edge ? half : right_share},
          {edge ? half_slope : -1, edge ? half_slope : 1}};
}

template <typename A>
__device__ __forceinline__ Axis<A> nearest_axis(A x, A size) {
  return {static_cast<int>(min(max(x, A(0)), size - 1)), true, {1, 0}, {0, 0}};
}

// Rounded before anything is added, as in torch: a location on the edge of a cell falls to its side.
__device__ __forceinline__ float product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double product(double a, double b) { return __dmul_rn(a, b); }

// 1 / (2 n) for a number of points, off by 2 units in the last place at most, without the branches
// of a division.
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
  Level<A> level;
};

// By how much the location of a point moves along an axis (0: x, 1: y) for each 1 of its offset, where its
// reference is a box, eq. (10).
template <typename A>
__device__ __forceinline__ A box_step(const Task& task, const A* reference, int axis, uint32_t level) {
  const uint32_t end = task.ragged ? task.point_end[level] : task.points_per_level;
  const uint32_t begin = task.ragged && level > 0 ? task.point_end[level - 1] : 0;
  return __ldg(reference + 2 + axis) * half_over(static_cast<A>(end - begin));
}

// A point's coordinate along an axis in pixels, from the level's edge on; `x` is its location or, in the
// fused form, its offset. The products are rounded before they are added to, as in torch: the same point is
// in the same cell on every backend.
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

// Point `point` of its query and head, eqs. (2) to (4) and (8) to (10). Every comparison with NaN is false: a
// location that is not a number touches nothing.
template <typename T, typename AnyForm, typename A = Accumulator<T>>
__device__ __forceinline__ Sample<A> locate(const Task& task, const Level<A>* levels, const AnyForm& form,
                                            bool counts, uint32_t point, bool nearest) {
  const A x = load_coordinate<T>(form.locations, 2 * uint64_t{point}, task.wide);
  const A y = load_coordinate<T>(form.locations, 2 * uint64_t{point} + 1, task.wide);
  const A weight = weight_of_point<T>(task, form, point);
  const uint32_t number = level_of_point(task, point);
  const Level<A> level = levels[number];
  const A shift = nearest ? A(0.5) : A(-0.5);
  const A column = in_pixels(task, form, 0, number, x, level.columns) + shift;
  const A row = in_pixels(task, form, 1, number, y, level.rows) + shift;
  const bool touches = nearest
                           ? counts && isfinite(column) && isfinite(row) && level.columns > 0
                           : counts && column > -1 && column < level.columns && row > -1 && row < level.rows;
  return {touches, weight, column, row, level};
}

// A point as the lanes of a team read it: how much of which pixels, eq. (1). Nearest uses the first only.
// Offsets count from the first pixel of the image and head, in vectors of Team::kVector channels; in the
// deterministic kernels, in pixels.
template <typename A>
struct alignas(16) Corners {
  A share[4];  // times the attention weight
  uint32_t offset[4];
};

template <typename A>
__device__ __forceinline__ Corners<A> corners_of(const Task& task, const Sample<A>& sample, bool nearest) {
  const Level<A>& level = sample.level;
  const Axis<A> x =
      nearest ? nearest_axis(sample.column, level.columns) : bilinear_axis(sample.column, level.columns);
  const Axis<A> y = nearest ? nearest_axis(sample.row, level.rows) : bilinear_axis(sample.row, level.rows);
  const uint32_t along = x.edge ? 0 : task.pixel_step, down = y.edge ? 0 : level.stride;
  const uint32_t upper = level.first + y.pixel * level.stride + x.pixel * task.pixel_step;
  const A upper_share = sample.weight * y.share[0], lower_share = sample.weight * y.share[1];
  return {{upper_share * x.share[0], upper_share * x.share[1], lower_share * x.share[0],
           lower_share * x.share[1]},
          {upper, upper + along, upper + down, upper + down + along}};
}

}  // namespace vitkern
