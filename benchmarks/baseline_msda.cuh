// SPDX-License-Identifier: Apache-2.0
// Multi-scale deformable attention as Deformable-DETR's kernels split it, written anew from the maths: what the static
// figures of docs/benchmarking.md and the counts of docs/counts.md are held against. Never launched on a card.
//
// Forward: one thread a channel, which locates every point for itself and reads four numbers of it. Backward: one block
// an image, query and head, one thread a channel; four atomic additions a point and channel, and the products that make
// the gradients of location and weight are summed over the channels by the first thread, through shared memory.
#pragma once

#include <cstdint>

#include "common/launch.cuh"

namespace baseline {

struct Arguments {
  int pixels, heads, channels, queries, levels, points, outputs;
  const void* value;
  const int64_t *shapes, *level_start;
  const void *locations, *weights, *grad_output;
  void *output, *grad_value, *grad_locations, *grad_weights;
};

template <typename T>
__device__ T* at(const void* data, int64_t index) {
  return static_cast<T*>(const_cast<void*>(data)) + index;
}

struct Point {
  int top, left, height, width;
  float down, right;  // how far below the upper and right of the left pixels
};

// Whether the point touches the level, and where.
__device__ inline bool locate(float x, float y, int height, int width, Point& point) {
  const float column = x * width - 0.5f, row = y * height - 0.5f;
  if (!(row > -1 && column > -1 && row < height && column < width)) return false;
  const float top = floorf(row), left = floorf(column);
  point = {static_cast<int>(top), static_cast<int>(left), height, width, row - top, column - left};
  return true;
}

// Calls with the index, the share and its slopes along x and y of each of the four pixels that lies in the level.
template <typename Call>
__device__ void each_corner(const Point& point, const Call& call) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = point.top + i / 2, column = point.left + i % 2;
    const float of_row = i / 2 ? point.down : 1 - point.down, of_column = i % 2 ? point.right : 1 - point.right;
    if (row >= 0 && row < point.height && column >= 0 && column < point.width)
      call(row * point.width + column, of_row * of_column, i % 2 ? of_row : -of_row, i / 2 ? of_column : -of_column);
  }
}

template <typename T>
__global__ void __launch_bounds__(1024) msda_forward(const Arguments a) {
  const int index = blockIdx.x * blockDim.x + threadIdx.x;
  if (index >= a.outputs) return;
  const int channel = index % a.channels, row = index / a.channels;
  const int head = row % a.heads, image = row / a.heads / a.queries;
  int point_index = row * a.levels * a.points;
  float sum = 0;
  for (int level = 0; level < a.levels; ++level) {
    const int start = a.level_start[level], height = a.shapes[2 * level], width = a.shapes[2 * level + 1];
    const int64_t first = (int64_t{image} * a.pixels + start) * a.heads * a.channels;
    const T* value = at<T>(a.value, first) + head * a.channels + channel;
    for (int p = 0; p < a.points; ++p, ++point_index) {
      const float x = *at<T>(a.locations, 2 * point_index), y = *at<T>(a.locations, 2 * point_index + 1);
      const float weight = *at<T>(a.weights, point_index);
      Point point;
      if (!locate(x, y, height, width, point)) continue;
      float sample = 0;
      each_corner(point, [&](int pixel, float share, float, float) {
        sample += share * static_cast<float>(value[pixel * a.heads * a.channels]);
      });
      sum += weight * sample;
    }
  }
  *at<T>(a.output, index) = static_cast<T>(sum);
}

template <typename T, int kChannels>
__global__ void __launch_bounds__(kChannels) msda_backward(const Arguments a) {
  __shared__ float part_of_x[kChannels], part_of_y[kChannels], part_of_weight[kChannels];
  const int row = blockIdx.x, channel = threadIdx.x;
  const int head = row % a.heads, image = row / a.heads / a.queries;
  const float grad = *at<T>(a.grad_output, int64_t{row} * kChannels + channel);
  int point_index = row * a.levels * a.points;
  for (int level = 0; level < a.levels; ++level) {
    const int start = a.level_start[level], height = a.shapes[2 * level], width = a.shapes[2 * level + 1];
    const int64_t first = ((int64_t{image} * a.pixels + start) * a.heads + head) * kChannels + channel;
    const T* value = at<T>(a.value, first);
    float* grad_value = at<float>(a.grad_value, first);
    for (int p = 0; p < a.points; ++p, ++point_index) {
      const float x = *at<T>(a.locations, 2 * point_index), y = *at<T>(a.locations, 2 * point_index + 1);
      const float weight = *at<T>(a.weights, point_index);
      float sample = 0, along_x = 0, along_y = 0;
      Point point;
      if (locate(x, y, height, width, point)) {
        each_corner(point, [&](int pixel, float share, float slope_x, float slope_y) {
          const float number = value[pixel * a.heads * kChannels];
          sample += share * number;
          along_x += slope_x * number;
          along_y += slope_y * number;
          atomicAdd(grad_value + pixel * a.heads * kChannels, share * weight * grad);
        });
      }
      part_of_x[channel] = along_x * width * weight * grad;
      part_of_y[channel] = along_y * height * weight * grad;
      part_of_weight[channel] = sample * grad;
      __syncthreads();
      if (channel == 0) {
        float sum_x = 0, sum_y = 0, sum_weight = 0;
        for (int c = 0; c < kChannels; ++c) {
          sum_x += part_of_x[c];
          sum_y += part_of_y[c];
          sum_weight += part_of_weight[c];
        }
        *at<T>(a.grad_locations, 2 * point_index) = static_cast<T>(sum_x);
        *at<T>(a.grad_locations, 2 * point_index + 1) = static_cast<T>(sum_y);
        *at<T>(a.grad_weights, point_index) = static_cast<T>(sum_weight);
      }
      __syncthreads();
    }
  }
}

}  // namespace baseline
