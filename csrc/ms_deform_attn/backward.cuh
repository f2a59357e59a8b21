// SPDX-License-Identifier: Apache-2.0
// ms_deform_attn backward, eqs. (5) to (7), (11) and (12) of docs/derivations/ms_deform_attn.md.
//
// Work split: as in forward, a team (device.cuh) owns one image, query and head, and its lanes locate
// one point each. For a point the lanes multiply their channels of grad_output with those of the four
// pixels; shuffles sum the four products over the team, and the lane that located the point turns them
// into its three gradients.
// Memory: value is gathered as in forward, grad_value scattered with vector reductions into the accumulator
// type; grad_locations and grad_weights are written once, coalesced.
// Fused form: (6) of a query's points waits in grad_weights until the sum in (11) is known; its lane
// reads it again.
// Numerics: only the order of the reductions into grad_value is left to chance. Reductions of floats flush
// subnormals, below 1.2e-38, to zero.
#pragma once

#include "common/atomics.cuh"
#include "ms_deform_attn/points.cuh"

namespace vitkern {

// A point in shared memory: what all lanes read, the products of grad_output with its four pixels, summed
// over the team, and what its own lane would otherwise hold in registers all the way.
template <typename A>
struct GradPoint {
  Corners<A> corners;
  A products[4];
  A column, row, weight;
};

// One point, the lane's channels: adds the products of grad_output and the pixels.
template <int kCorners, int kVector, typename T, typename A = Accumulator<T>>
__device__ __forceinline__ void add_products(const Corners<A>& corners, const T* value,
                                             const A (&grad)[kVector], A (&products)[4]) {
#pragma unroll
  for (int c = 0; c < kCorners; ++c) {
    A pixel[kVector];
    load_vector(value, corners.offset[c], pixel);
#pragma unroll
    for (int j = 0; j < kVector; ++j) products[c] = fma(grad[j], pixel[j], products[c]);
  }
}

// One point, the lane's channels: adds its part to grad_value, eq. (5).
template <int kCorners, int kVector, typename A>
__device__ __forceinline__ void scatter_parts(const Corners<A>& corners, const A (&grad)[kVector],
                                              A* grad_value) {
#pragma unroll
  for (int c = 0; c < kCorners; ++c) {
    A part[kVector];
#pragma unroll
    for (int j = 0; j < kVector; ++j) part[j] = corners.share[c] * grad[j];
    atomic_add(grad_value, corners.offset[c], part);
  }
}

// From the derivative along an axis, a pixel being 1, to that by a point's location or offset, eqs.
// (7) and (12).
template <typename AnyForm, typename A>
__device__ __forceinline__ A input_gradient(const Task& task, const AnyForm& form, int axis, uint32_t level,
                                            A along, A size) {
  if constexpr (AnyForm::kFused) {
    if (task.reference.numbers == 2) return along;
    size *= box_step(task, form.reference + level * task.reference.level_stride, axis, level);
  }
  return along * size;
}

// Eqs. (6) and (7), from the products of grad_output with the four pixels; `index` is that of the point. In
// the fused form grad_weights gets (6) too, which waits there for store_logit_gradients.
template <typename T, bool kNearest, typename AnyForm, typename A = Accumulator<T>>
__device__ __forceinline__ void store_point_gradients(const Task& task, const Level<A>* levels,
                                                      const AnyForm& form, int64_t index, uint32_t in_query,
                                                      const GradPoint<A>& point, bool touches) {
  const uint32_t number = level_of_point(task, in_query);
  const Level<A> level = levels[number];
  A weight = 0, along_x = 0, along_y = 0;
  A input_x = 0, input_y = 0;
  if (kNearest && touches) weight = point.products[0];
  if (!kNearest && touches) {
    const Axis<A> x = bilinear_axis(point.column, level.columns), y = bilinear_axis(point.row, level.rows);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const A* products = point.products + 2 * r;
      const A sample = x.share[0] * products[0] + x.share[1] * products[1];
      weight += y.share[r] * sample;
      along_x += y.share[r] * (x.slope[0] * products[0] + x.slope[1] * products[1]);
      along_y += y.slope[r] * sample;
    }
    along_x *= point.weight;
    along_y *= point.weight;
    input_x = input_gradient(task, form, 0, number, along_x, level.columns);
    input_y = input_gradient(task, form, 1, number, along_y, level.rows);
  }
  if (task.grad_weights) store_coordinate<T>(task.grad_weights, index, task.wide || AnyForm::kFused, weight);
  if (AnyForm::kFused && task.grad_computed) {
    static_cast<A*>(task.grad_computed)[2 * index] = along_x * level.columns;
    static_cast<A*>(task.grad_computed)[2 * index + 1] = along_y * level.rows;
  }
  if (task.grad_locations) {
    store_coordinate<T>(task.grad_locations, 2 * index, task.wide, input_x);
    store_coordinate<T>(task.grad_locations, 2 * index + 1, task.wide, input_y);
  }
}

// Eq. (11), once (6) of all points waits in grad_weights.
template <typename T, int kLanes, typename A = Accumulator<T>>
__device__ __forceinline__ void store_logit_gradients(const Task& task, const Place& place,
                                                      const Fused<A>& fused) {
  A* gradients = static_cast<A*>(task.grad_weights);
  const int64_t first = place.index * task.points;
  const uint32_t lane = threadIdx.x % kLanes, end = place.exists ? task.points : 0;
  A sum = 0;
#pragma unroll 1
  for (uint32_t point = lane; point < end; point += kLanes)
    sum += weight_of_point<T>(task, fused, point) * gradients[first + point];
  sum = team_reduce<kLanes>(sum, [](A a, A b) { return a + b; });
#pragma unroll 1
  for (uint32_t point = lane; point < end; point += kLanes) {
    A& gradient = gradients[first + point];
    gradient = weight_of_point<T>(task, fused, point) * (gradient - sum);
  }
}

// All points of one image, query and head.
template <typename T, int kChannels, bool kNearest, typename AnyForm, typename A = Accumulator<T>>
__device__ __forceinline__ void backward_team(const Task& task, const Level<A>* levels, const Place& place,
                                              const AnyForm& form, GradPoint<A>* points) {
  using Split = Team<T, kChannels>;
  constexpr int kCorners = kNearest ? 1 : 4;
  const uint32_t lane = threadIdx.x % Split::kLanes, channel = lane * Split::kVector;
  const bool coordinates = task.point_gradients;
  const int64_t first_channel = first_pixel(task, place) + channel;
  const T* value = static_cast<const T*>(task.value) + first_channel;
  A* grad_value = task.grad_value ? static_cast<A*>(task.grad_value) + first_channel : nullptr;
  const T* grad_output = static_cast<const T*>(task.grad_output) + place.index * task.channels + channel;
  A grad[Split::kVector] = {};
  if (kChannels) load(grad_output, grad);

  for (uint32_t first = 0; first < task.points; first += Split::kLanes) {
    const uint32_t point = first + lane;
    const bool mine = point < (place.exists ? task.points : 0);
    const Sample<A> sample = locate<T>(task, levels, form, mine, mine ? point : 0, kNearest);
    // A point that touches nothing reads the first pixel in vain, which spares a branch.
    points[lane].corners = {};
    if (sample.touches)
      points[lane] = {corners_of(task, sample, kNearest), {}, sample.column, sample.row, sample.weight};
    const bool scatters = grad_value && sample.touches;
    const unsigned scattering = team_ballot<Split::kLanes>(scatters) >> first_lane<Split::kLanes>();
    __syncwarp();

    // The same number of rounds for all teams of the warp, for the shuffles' sake.
    const int count = min(Split::kLanes, static_cast<int>(task.points - first));
    for (int i = 0; i < count; ++i) {
      const Corners<A> corners = points[i].corners;
      const bool scatter = scattering >> i & 1u;
      A products[4] = {};
      if constexpr (kChannels != 0) {
        if (coordinates) add_products<kCorners>(corners, value, grad, products);
        if (scatter) scatter_parts<kCorners>(corners, grad, grad_value);
      } else {
        for (uint32_t c = 0; c + lane < task.channels; c += Split::kTile) {
          load(grad_output + c, grad);
          if (coordinates) add_products<kCorners>(corners, value + c, grad, products);
          if (scatter) scatter_parts<kCorners>(corners, grad, grad_value + c);
        }
      }
      if (coordinates) {
        scatter_sums<Split::kLanes, 4>(products);
        constexpr int kHeld = Split::kLanes < 4 ? 4 / Split::kLanes : 1, kHolders = 4 / kHeld;
        constexpr int kLanesPerSum = Split::kLanes / kHolders;
#pragma unroll
        for (int h = 0; h < kHeld; ++h)
          if (lane % kLanesPerSum == 0) points[i].products[lane / kLanesPerSum * kHeld + h] = products[h];
      }
    }
    __syncwarp();
    if (coordinates && mine) {
      const int64_t index = place.index * task.points + point;
      store_point_gradients<T, kNearest>(task, levels, form, index, point, points[lane], sample.touches);
    }
  }
}

template <typename T, int kChannels, bool kFused>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T>)
    ms_deform_attn_backward(const __grid_constant__ Task task) {
  using Split = Team<T, kChannels>;
  // The odd stride puts neighbouring teams into different banks; every other team shares them.
  __shared__ GradPoint<Accumulator<T>> staged[Split::kPerBlock][Split::kLanes + 1];
  __shared__ Form<T, kFused> forms[Split::kPerBlock];  // where they take no registers
  static_assert(leaves_room_for_levels<decltype(staged), decltype(forms)>);
  VITKERN_DYNAMIC_SHARED(Level<Accumulator<T>>, levels);
  load_levels(task, levels);
  levels = opaque_shared(levels);
  GradPoint<Accumulator<T>>* points = opaque_shared(staged[threadIdx.x / Split::kLanes]);
  Form<T, kFused>& form = forms[threadIdx.x / Split::kLanes];
  const Place place = team_place<Split::kLanes>(task);
  const Form<T, kFused> found = form_of_team<T, kFused, Split::kLanes>(task, place);
  if (threadIdx.x % Split::kLanes == 0) form = found;
  __syncwarp();
  if (kKnowsNearest<kChannels, kFused> && task.nearest) {
    backward_team<T, kChannels, true>(task, levels, place, form, points);
  } else {
    backward_team<T, kChannels, false>(task, levels, place, form, points);
  }
  if constexpr (kFused)
    if (task.grad_weights) store_logit_gradients<T, Split::kLanes>(task, place, form);
}

}  // namespace vitkern
