// SPDX-License-Identifier: Apache-2.0
// The instructions of common/tensor_cores.cuh in the emulator. Prints lines of numbers;
// tests/test_emulator.py has the expected ones.
#include <cstdio>
#include <vector>

#include "common/warp_product.cuh"

using namespace vitkern;

constexpr int kRows = 16, kColumns = 16, kDepth = 32;

// out = left right, from factors that lie along or across the depth.
template <typename T, bool kAcrossLeft, bool kAcrossRight>
__global__ void product(const T* left, const T* right, float* out) {
  alignas(16) __shared__ T tiles[2][kDepth * kColumns];
  for (int i = threadIdx.x; i < kDepth * kColumns; i += kWarpLanes) {
    const int row = i / kDepth, k = i % kDepth;
    tiles[0][kAcrossLeft ? k * kRows + row : i] = left[i];
    tiles[1][kAcrossRight ? k * kColumns + row : i] = right[i];
  }
  __syncwarp();
  Sums<float> sums[2] = {};
  multiply_add(Factor<T, kAcrossLeft>{tiles[0], kAcrossLeft ? kRows : kDepth},
               Factor<T, kAcrossRight>{tiles[1], kAcrossRight ? kColumns : kDepth}, kDepth, sums);
  for (int tile = 0; tile < 2; ++tile)
    for (int i = 0; i < 4; ++i)
      out[row_of_sum(i) * kColumns + tile * kTileColumns + column_of_sum(i)] = sums[tile].at[i];
}

template <typename T, bool kAcrossLeft, bool kAcrossRight>
void print_product(const char* name) {
  std::vector<T> left(kRows * kDepth), right(kColumns * kDepth);
  for (int i = 0; i < kRows * kDepth; ++i) {
    left[i] = narrow<T>(static_cast<float>(i % 7 - 3));
    right[i] = narrow<T>(static_cast<float>(i % 5 - 2));
  }
  std::vector<float> out(kRows * kColumns);
  launch("product", product<T, kAcrossLeft, kAcrossRight>, dim3(1), dim3(kWarpLanes), 0, nullptr, left.data(),
         right.data(), out.data());
  std::printf("%s", name);
  for (const float sum : out) std::printf(" %g", sum);
  std::printf("\n");
}

// Shared memory before and after the wait: a copy may arrive at any time between, so until then it is not a number.
__global__ void copies(const float* in, float* out) {
  alignas(16) __shared__ float target[8];
  target[threadIdx.x] = -1;
  __syncthreads();
  if (threadIdx.x < 2) copy_async(target + 4 * threadIdx.x, in, threadIdx.x == 0);
  __syncthreads();
  out[threadIdx.x] = target[threadIdx.x];
  __syncthreads();
  wait_for_copies();
  __syncthreads();
  out[8 + threadIdx.x] = target[threadIdx.x];
}

// One lane stays away from its warp's product.
__global__ void lane_without_product(float* out) {
  uint32_t a[4] = {};
  float sums[4] = {};
  if (threadIdx.x != 5) multiply_add_tile<__half>(sums, a, 0, 0);
  out[threadIdx.x] = sums[0];
}

int main(int arguments, char**) {
  std::vector<float> numbers = {1, 2, 3, 4}, out(kWarpLanes);
  if (arguments > 1) {
    try {
      launch("lane_without_product", lane_without_product, dim3(1), dim3(kWarpLanes), 0, nullptr, out.data());
    } catch (const std::exception& error) {
      std::printf("%s\n", error.what());
    }
    return 0;
  }
  print_product<__half, false, false>("half");
  print_product<__half, true, false>("half_across_left");
  print_product<__nv_bfloat16, false, true>("bfloat_across_right");
  print_product<__nv_bfloat16, true, true>("bfloat_across");
  print_product<float, true, false>("float_across_left");
  print_product<float, false, true>("float_across_right");
  launch("copies", copies, dim3(1), dim3(8), 0, nullptr, numbers.data(), out.data());
  std::printf("copies");
  for (int i = 0; i < 16; ++i) std::printf(" %g", out[i]);
  std::printf("\n");
}
