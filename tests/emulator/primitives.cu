// SPDX-License-Identifier: Apache-2.0
//
// Kernels that use each feature of the emulator. Prints a line of numbers for each; tests/test_emulator.py has the
// expected ones.
#include <cstdio>

#include "common/launch.cuh"

using vitkern::launch;

// The sum of a block's numbers: shuffles inside the warps, shared memory and a barrier between them.
__global__ void block_sums(const float* in, float* out) {
  __shared__ float of_warp[32];
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  float sum = in[blockIdx.x * threads + thread];
  for (int flip = 16; flip > 0; flip /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, flip);
  if (thread % 32 == 0) of_warp[thread / 32] = sum;
  __syncthreads();
  if (thread > 0) return;
  for (int warp = 1; warp < threads / 32; ++warp) sum += of_warp[warp];
  out[blockIdx.x] = sum;
}

// Reverses the block's numbers through shared memory of a size that the launch gives.
__global__ void reverse(int* data) {
  VITKERN_DYNAMIC_SHARED(int, copy);
  copy[threadIdx.x] = data[threadIdx.x];
  __syncthreads();
  data[threadIdx.x] = copy[blockDim.x - 1 - threadIdx.x];
}

__global__ void shuffles(int* out) {
  const int lane = threadIdx.x;
  out[lane] = __shfl_sync(0xffffffffu, lane, 3);
  out[32 + lane] = __shfl_up_sync(0xffffffffu, lane, 2);
  out[64 + lane] = __shfl_down_sync(0xffffffffu, lane, 5, 8);
  out[96 + lane] = static_cast<int>(__shfl_xor_sync(0xffffffffu, 0.5 * lane, 1) * 2);
  out[128 + lane] = static_cast<int>(__ballot_sync(0xffffffffu, lane % 5 == 0));
  // Halves of a warp may go separate ways, each with its own mask.
  out[160 + lane] = lane < 16 ? __any_sync(0x0000ffffu, lane == 20) : __any_sync(0xffff0000u, lane == 20);
}

__global__ void count(int* i, float* f, double* d, __half* h, __nv_bfloat16* b) {
  atomicAdd(i, 1);
  atomicAdd(f, 1.0f);
  atomicAdd(d, 1.0);
  atomicAdd(h, __float2half_rn(1.0f));
  atomicAdd(b, __float2bfloat16_rn(1.0f));
}

template <typename T>
void print(const char* name, const T* numbers, int many) {
  std::printf("%s", name);
  for (int i = 0; i < many; ++i) std::printf(" %.10g", static_cast<double>(numbers[i]));
  std::printf("\n");
}

int main() {
  constexpr int kBlocks = 64, kSize = 256;
  std::vector<float> in(kBlocks * kSize), sums(kBlocks);
  for (int i = 0; i < kBlocks * kSize; ++i) in[i] = static_cast<float>(i % 97);
  launch("block_sums", block_sums, dim3(kBlocks), dim3(32, kSize / 32), 0, nullptr, in.data(), sums.data());
  print("block_sums", sums.data(), kBlocks);

  std::vector<int> numbers(100), lanes(192);
  for (int i = 0; i < 100; ++i) numbers[i] = i;
  launch("reverse", reverse, dim3(1), dim3(100), 100 * sizeof(int), nullptr, numbers.data());
  print("reverse", numbers.data(), 100);
  launch("shuffles", shuffles, dim3(1), dim3(32), 0, nullptr, lanes.data());
  print("shuffles", lanes.data(), 192);

  int i = 0;
  float f = 0;
  double d = 0;
  __half h = __float2half_rn(0);
  __nv_bfloat16 b = __float2bfloat16_rn(0);
  launch("count", count, dim3(7), dim3(20), 0, nullptr, &i, &f, &d, &h, &b);
  const double counts[] = {double(i), f, d, __half2float(h), __bfloat162float(b)};
  print("count", counts, 5);

  // Every half survives a trip through float; the floats between are checked against numpy.
  int lost = 0;
  for (unsigned bits = 0; bits < 0x10000; ++bits) {
    const float number = __half2float(__half{static_cast<uint16_t>(bits)});
    lost += number == number && __float2half_rn(number).bits != bits;
  }
  print("lost_halves", &lost, 1);
  const float numbers_between[] = {1.00048828125f, 1.00146484375f, 65519.9f, 65520.f,
                                   6e-8f,          2.9e-8f,        1e-5f,    -0.1f};
  double halves[8], bfloats[8];
  for (int n = 0; n < 8; ++n) {
    halves[n] = __half2float(__float2half_rn(numbers_between[n]));
    bfloats[n] = __bfloat162float(__float2bfloat16_rn(numbers_between[n]));
  }
  print("halves", halves, 8);
  print("bfloats", bfloats, 8);
}
