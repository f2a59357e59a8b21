// SPDX-License-Identifier: Apache-2.0
// Kernels with one race each, started by name; their results are right as long as threads take turns. "fine" has no
// race. Prints "right" or "wrong", or the race detector's report, which tests/test_races.py expects.
#include <cstdio>
#include <cstring>

#include "common/launch.cuh"
#include "common/tensor_cores.cuh"

using namespace vitkern;

constexpr unsigned kAll = 0xffffffffu;
constexpr int kThreads = 64;

// Each is to leave in[i] + in[other(i)] in out[i], where other(i) = i ^ 31 is the mirrored lane of the warp.
__device__ inline int other(int i) { return i ^ 31; }

__global__ void fine(const int* in, int* out, int*) {
  __shared__ int staged[kThreads];
  const int i = threadIdx.x;
  staged[i] = in[i];
  __syncwarp();
  if (blockIdx.x == 0) out[i] = in[i] + staged[other(i)];
}

__global__ void no_barrier_but_a_shuffle(const int* in, int* out, int*) {
  __shared__ int staged[kThreads];
  const int i = threadIdx.x;
  staged[i] = in[i];
  __shfl_xor_sync(kAll, i, 1);
  if (blockIdx.x == 0) out[i] = in[i] + staged[other(i)];
}

__global__ void no_barrier_but_a_vote(const int* in, int* out, int*) {
  __shared__ int staged[kThreads];
  const int i = threadIdx.x;
  staged[i] = in[i];
  __ballot_sync(kAll, 1);
  if (blockIdx.x == 0) out[i] = in[i] + staged[other(i)];
}

// ldmatrix reads rows that other lanes have just written.
__global__ void no_barrier_but_ldmatrix(const int* in, int* out, int*) {
  alignas(16) __shared__ int staged[2][32][4];
  const int i = threadIdx.x, lane = i % 32;
  for (int k = 0; k < 4; ++k) staged[i / 32][lane][k] = in[i - lane + lane / 8 * 8];
  uint32_t found[4];
  load_matrices<false>(found, staged[i / 32][lane]);
  int sum = 0;
  for (int k = 0; k < 4; ++k) sum += static_cast<int>(found[k]) == in[i - lane + 8 * k];
  if (blockIdx.x == 0) out[i] = sum == 4 ? in[i] + in[other(i)] : 0;
}

// The second round overwrites what lanes of the first may still read.
__global__ void no_barrier_before_the_next_round(const int* in, int* out, int*) {
  __shared__ int staged[kThreads];
  const int i = threadIdx.x;
  int sum = 0;
  for (int round = 0; round < 2; ++round) {
    __ballot_sync(kAll, round);
    staged[i] = in[i] + round;
    __syncwarp();
    sum = staged[other(i)] - round;
  }
  if (blockIdx.x == 0) out[i] = in[i] + sum;
}

__global__ void a_barrier_of_half_the_lanes(const int* in, int* out, int*) {
  __shared__ int staged[kThreads];
  const int i = threadIdx.x;
  staged[i] = in[i];
  __syncwarp(i % 32 < 16 ? 0x0000ffffu : 0xffff0000u);
  __ballot_sync(kAll, 1);
  if (blockIdx.x == 0) out[i] = in[i] + staged[other(i)];
}

// The next numbers are on their way while others still read the last ones.
__global__ void a_copy_into_what_is_read(const int* in, int* out, int* more) {
  alignas(16) __shared__ int staged[kThreads];
  const int i = threadIdx.x;
  staged[i] = in[i];
  __syncthreads();
  if (i == 0) copy_async(staged + 60, more, true);
  const int found = i < kThreads - 4 || i % 32 ? staged[other(i)] : 0;
  __syncthreads();
  wait_for_copies();
  if (blockIdx.x == 0) out[i] = in[i] + found;
}

__global__ void a_wait_without_a_barrier(const int* in, int* out, int*) {
  alignas(16) __shared__ int staged[kThreads];
  const int i = threadIdx.x;
  if (i % 4 == 0) copy_async(staged + i, in + i, true);
  wait_for_copies();
  __any_sync(kAll, 1);
  if (blockIdx.x == 0) out[i] = in[i] + staged[other(i)];
}

// Its own thread, too, must not touch the source while a copy reads it.
__global__ void a_copy_from_what_is_written(const int* in, int* out, int* more) {
  alignas(16) __shared__ int staged[kThreads];
  const int i = threadIdx.x;
  int* own = more + 4 * (blockIdx.x * kThreads + i);
  if (i % 4 == 0) copy_async(staged + i, own, true);
  own[0] = 0;
  wait_for_copies();
  if (blockIdx.x == 0) out[i] = in[i] + in[other(i)];
}

__global__ void the_wait_of_another_group(const int* in, int* out, int*) {
  alignas(16) __shared__ int staged[2][4 * kThreads];
  const int i = threadIdx.x;
  for (int part = 0; part < 2; ++part) {
    copy_async(staged[part] + 4 * i, in, true);
    commit_copies();
  }
  wait_for_groups<1>();
  const bool as_hoped = staged[0][4 * i] == in[0] && staged[1][4 * i] != in[0] + 1;
  if (blockIdx.x == 0) out[i] = as_hoped ? in[i] + in[other(i)] : 0;
  wait_for_groups<0>();
}

__global__ void a_plain_write_beside_an_atomic(const int* in, int* out, int* more) {
  const int i = threadIdx.x;
  if (blockIdx.x == 0) {
    out[i] = in[i] + in[other(i)];
    if (i == 0) atomicAdd(more, 0);
  } else if (i == 0) {
    *more = 0;
  }
}

__global__ void two_blocks_write_the_same(const int* in, int* out, int*) {
  out[threadIdx.x] = in[threadIdx.x] + in[other(threadIdx.x)];
}

__global__ void a_read_of_another_block(const int* in, int* out, int* more) {
  const int i = threadIdx.x;
  more[blockIdx.x * kThreads + i] = 0;
  const int before = more[i];
  if (blockIdx.x == 0) out[i] = in[i] + in[other(i)];
  if (before == 12345) out[i] = 0;
}

__global__ void an_atomic_as_a_flag(const int* in, int* out, int* more) {
  __shared__ int number;
  const int i = threadIdx.x;
  if (blockIdx.x == 0) out[i] = in[i] + in[other(i)];
  if (i == 0) {
    number = 7;
    atomicAdd(more + blockIdx.x, 1);
  } else if (atomicAdd(more + blockIdx.x, 0) && number != 7) {
    out[i] = 0;
  }
}

__global__ void all_lanes_write_the_same(const int* in, int* out, int*) {
  __shared__ int of_warp[2];
  const int i = threadIdx.x;
  of_warp[i / 32] = i / 32;
  __syncwarp();
  if (blockIdx.x == 0) out[i] = of_warp[i / 32] == i / 32 ? in[i] + in[other(i)] : 0;
}

__global__ void shared_memory_that_nothing_has_written(const int* in, int* out, int*) {
  __shared__ int staged[kThreads + 1];
  const int i = threadIdx.x;
  staged[i] = in[i];
  __syncthreads();
  if (blockIdx.x == 0) out[i] = in[i] + staged[other(i)] + (staged[i + 1] == 12345);
}

// A seed that switches between the two accesses loses an update.
__global__ void an_update_in_two_steps(const int* in, int* out, int*) {
  __shared__ int sum;
  const int i = threadIdx.x;
  if (i == 0) sum = 0;
  __syncthreads();
  sum += 1;
  __syncthreads();
  if (blockIdx.x == 0) out[i] = sum == kThreads ? in[i] + in[other(i)] : 0;
}

int main(int, char** arguments) {
  std::vector<int> data(kThreads), out(kThreads), more(8 * kThreads);
  for (int i = 0; i < kThreads; ++i) data[i] = 100 + i;
  const struct {
    const char* name;
    void (*kernel)(const int*, int*, int*);
  } kernels[] = {
#define KERNEL(NAME) {#NAME, NAME}
      KERNEL(fine),
      KERNEL(no_barrier_but_a_shuffle),
      KERNEL(no_barrier_but_a_vote),
      KERNEL(no_barrier_but_ldmatrix),
      KERNEL(no_barrier_before_the_next_round),
      KERNEL(a_barrier_of_half_the_lanes),
      KERNEL(a_copy_into_what_is_read),
      KERNEL(a_wait_without_a_barrier),
      KERNEL(a_copy_from_what_is_written),
      KERNEL(the_wait_of_another_group),
      KERNEL(a_plain_write_beside_an_atomic),
      KERNEL(two_blocks_write_the_same),
      KERNEL(a_read_of_another_block),
      KERNEL(an_atomic_as_a_flag),
      KERNEL(all_lanes_write_the_same),
      KERNEL(shared_memory_that_nothing_has_written),
      KERNEL(an_update_in_two_steps),
  };
  try {
    for (const auto& kernel : kernels)
      if (std::strcmp(kernel.name, arguments[1]) == 0)
        launch(kernel.name, kernel.kernel, dim3(2), dim3(kThreads), 0, nullptr,
               static_cast<const int*>(data.data()), out.data(), more.data());
    bool right = true;
    for (int i = 0; i < kThreads; ++i) right &= out[i] == data[i] + data[i ^ 31];
    std::puts(right ? "right" : "wrong");
  } catch (const std::exception& error) {
    std::puts(error.what());
  }
}
