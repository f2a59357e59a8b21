// SPDX-License-Identifier: Apache-2.0
//
// Kernels with one planted fault each, started by name. Prints their results, or the emulator's reason for stopping.
#include <cstdio>
#include <cstring>

#include "common/launch.cuh"

using vitkern::launch;

__global__ void missing_barrier(int* data) {
  __shared__ int copy[64];
  copy[threadIdx.x] = data[threadIdx.x];
  // __syncthreads() belongs here
  data[threadIdx.x] = copy[63 - threadIdx.x];
}

__global__ void divergent_barrier(int* data) {
  if (threadIdx.x < 40) __syncthreads();
  data[threadIdx.x] = 1;
}

__global__ void lane_missing(int* data) {
  if (threadIdx.x == 5) return;
  data[threadIdx.x] = __shfl_xor_sync(0xffffffffu, data[threadIdx.x], 1);
}

__global__ void caller_not_in_mask(int* data) {
  data[threadIdx.x] = __shfl_sync(0x0000ffffu, data[threadIdx.x], 0);
}

__global__ void source_not_in_mask(int* data) {
  if (threadIdx.x < 16) data[threadIdx.x] = __shfl_sync(0x0000ffffu, data[threadIdx.x], 20);
}

__global__ void different_operations(int* data) {
  if (threadIdx.x < 16) {
    data[threadIdx.x] = __shfl_sync(0xffffffffu, 1, 0);
  } else {
    data[threadIdx.x] = static_cast<int>(__ballot_sync(0xffffffffu, 1));
  }
}

__global__ void shared_overrun(int* data) {
  __shared__ int copy[64];
  copy[threadIdx.x + (data[0] == 0)] = 1;  // one too far for the last thread
  __syncthreads();
  data[threadIdx.x] = copy[threadIdx.x];
}

__global__ void global_overrun(int* data) { data[threadIdx.x + 1] = 1; }

__global__ void dynamic_shared_overrun(int* data) {
  VITKERN_DYNAMIC_SHARED(int, copy);
  copy[threadIdx.x] = data[threadIdx.x];
}

int main(int, char** arguments) {
  std::vector<int> data(64);
  for (int i = 0; i < 64; ++i) data[i] = i;
  const struct {
    const char* name;
    void (*kernel)(int*);
  } faults[] = {
#define FAULT(NAME) {#NAME, NAME}
      FAULT(missing_barrier),    FAULT(divergent_barrier),      FAULT(lane_missing),
      FAULT(caller_not_in_mask), FAULT(source_not_in_mask),     FAULT(shared_overrun),
      FAULT(global_overrun),     FAULT(dynamic_shared_overrun), FAULT(different_operations),
  };
  try {
    for (const auto& fault : faults)
      if (std::strcmp(fault.name, arguments[1]) == 0)
        launch(fault.name, fault.kernel, dim3(1), dim3(64), 63 * sizeof(int), nullptr, data.data());
    for (int number : data) std::printf("%d ", number);
  } catch (const std::exception& error) {
    std::printf("%s", error.what());
  }
}
