// SPDX-License-Identifier: Apache-2.0
// ms_deform_attn backward, eqs. (5) to (7) of docs/derivations/ms_deform_attn.md.
//
// Work split: as in forward, a team (device.cuh) owns one image, query and head, and its lanes locate one point each.
// For a point the lanes multiply their channels of grad_output with those of the four pixels; shuffles sum the four
// products over the team, and the lane that located the point turns them into its three gradients.
// Memory: value is gathered as in forward, grad_value scattered with vector reductions into the accumulator type;
// grad_locations and grad_weights are written once, coalesced.
// Numerics: only the order of the reductions into grad_value is left to chance.
#pragma once

#include "common/atomics.cuh"
#include "ms_deform_attn/device.cuh"

namespace vitkern {

// One point, a tile of channels: adds the products of grad_output and pixels to `products`, and the point's part to
// grad_value, eq. (5). A point that touches nothing reads the first pixel in vain, which spares a branch.
template <int kCorners, int kVector, typename T, typename A = Accumulator<T>>
__device__ __forceinline__ void scatter_point(const Corners<A>& corners, bool touches, const T* value, A* grad_value,
                                              uint32_t row_channels, bool coordinates, const A (&grad)[kVector],
                                              A (&products)[4]) {
  if (coordinates) {
#pragma unroll
    for (int c = 0; c < kCorners; ++c) {
      A pixel[kVector];
      load(at_row(value, corners.pixel[c], row_channels * uint32_t{sizeof(T)}), pixel);
#pragma unroll
      for (int j = 0; j < kVector; ++j) products[c] = fma(grad[j], pixel[j], products[c]);
    }
  }
  if (grad_value && touches) {
#pragma unroll
    for (int c = 0; c < kCorners; ++c) {
      A part[kVector];
#pragma unroll
      for (int j = 0; j < kVector; ++j) part[j] = corners.share[c] * grad[j];
      atomic_add(at_row(grad_value, corners.pixel[c], row_channels * uint32_t{sizeof(A)}), part);
    }
  }
}

// Eqs. (6) and (7), from the products of grad_output with the four pixels. `index` is that of the point.
template <typename T, typename A = Accumulator<T>>
__device__ __forceinline__ void store_point_gradients(const MsDeformAttnParams& p, int64_t index,
                                                      const Sample<A>& sample, const A (&products)[4]) {
  A weight = 0, x = 0, y = 0;
  if (sample.touches) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const A along = sample.x.share[0] * products[2 * r] + sample.x.share[1] * products[2 * r + 1];
      weight += sample.y.share[r] * along;
      y += sample.y.slope[r] * along;
      x += sample.y.share[r] * (sample.x.slope[0] * products[2 * r] + sample.x.slope[1] * products[2 * r + 1]);
    }
    x *= sample.weight * sample.width;
    y *= sample.weight * sample.height;
  }
  const bool wide = wide_coordinates<T>(p);
  if (p.grad_weights) store_coordinate<T>(p.grad_weights, index, wide, weight);
  if (p.grad_locations) {
    store_coordinate<T>(p.grad_locations, 2 * index, wide, x);
    store_coordinate<T>(p.grad_locations, 2 * index + 1, wide, y);
  }
}

// A round's points in shared memory, as forward has them, and the four products of each, summed over the team.
template <typename T, int kChannels>
struct StagedGradients {
  StagedPoints<T, kChannels> points;
  Accumulator<T> products[Team<T, kChannels>::kPerBlock][Team<T, kChannels>::kLanes][4];
};

// All points of one image, query and head.
template <typename T, int kChannels, int kCorners>
__device__ __forceinline__ void backward_team(const MsDeformAttnParams& p, const Place& place,
                                              StagedGradients<T, kChannels>& staged) {
  using A = Accumulator<T>;
  using Split = Team<T, kChannels>;
  Corners<A>* points = staged.points[threadIdx.x / Split::kLanes];
  A(*sums)[4] = staged.products[threadIdx.x / Split::kLanes];
  const uint32_t lane = threadIdx.x % Split::kLanes, channels = static_cast<uint32_t>(p.channels);
  const uint32_t channel = lane * Split::kVector, row_channels = static_cast<uint32_t>(p.heads * p.channels);
  const bool coordinates = p.grad_locations || p.grad_weights;
  const int64_t head = (int64_t{place.image} * p.pixels * p.heads + place.head) * p.channels;
  const T* value = static_cast<const T*>(p.value) + head + channel;
  A* grad_value = p.grad_value ? static_cast<A*>(p.grad_value) + head + channel : nullptr;
  const T* grad_output = static_cast<const T*>(p.grad_output) + place.index * p.channels + channel;
  A grad[Split::kVector] = {};
  if (kChannels && place.exists) load(grad_output, grad);

  for (uint32_t first = 0; first < p.points; first += Split::kLanes) {
    const uint32_t point = first + lane;
    Sample<A> sample;
    sample.touches = false;
    if (place.exists && point < p.points) sample = locate<T>(p, place.index, point);
    const unsigned touching = team_ballot<Split::kLanes>(sample.touches);
    __syncwarp();  // nobody reads the last round's points any more
    points[lane] = sample.touches ? corners_of(sample) : Corners<A>{};
    __syncwarp();

    // The same number of rounds for all teams of the warp, for the shuffles' sake.
    const int count = min(Split::kLanes, static_cast<int>(p.points - first));
    for (int i = 0; i < count; ++i) {
      const Corners<A> corners = points[i];
      const bool touches = touching >> i & 1;
      A products[4] = {};
      if constexpr (kChannels != 0) {
        scatter_point<kCorners>(corners, touches, value, grad_value, row_channels, coordinates, grad, products);
      } else {
        for (uint32_t c = 0; c + lane < channels && place.exists; c += Split::kTile) {
          load(grad_output + c, grad);
          scatter_point<kCorners>(corners, touches, value + c, grad_value ? grad_value + c : nullptr, row_channels,
                                  coordinates, grad, products);
        }
      }
      if (coordinates) {
        scatter_sums<Split::kLanes, 4>(products);
        constexpr int kHeld = Split::kLanes < 4 ? 4 / Split::kLanes : 1;
#pragma unroll
        for (int h = 0; h < kHeld; ++h)
          if (lane * 4 % Split::kLanes == 0 || kHeld > 1) sums[i][lane * 4 / Split::kLanes + h] = products[h];
      }
    }
    __syncwarp();
    if (coordinates && place.exists && point < p.points)
      store_point_gradients<T>(p, place.index * p.points + point, sample, sums[lane]);
  }
}

template <typename T, int kChannels>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T>)
    ms_deform_attn_backward(const __grid_constant__ MsDeformAttnParams p) {
  __shared__ StagedGradients<T, kChannels> staged;
  const Place place = team_place<Team<T, kChannels>::kLanes>(p.queries, p.heads);
  if (p.sampling == Sampling::kBilinear) {
    backward_team<T, kChannels, 4>(p, place, staged);
  } else {
    backward_team<T, kChannels, 1>(p, place, staged);
  }
}

}  // namespace vitkern
