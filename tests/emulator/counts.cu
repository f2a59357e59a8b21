// SPDX-License-Identifier: Apache-2.0
// Kernels for tests of the counter, whose counts are known by hand. Each runs in one block of 32 x 8 threads, unless its
// launch says otherwise.
#include <cstdio>
#include <tuple>

#include "common/atomics.cuh"
#include "common/tensor_cores.cuh"
#include "common/vec.cuh"

using vitkern::launch;

extern "C" void vitkern_counts_name(const char* name, const void* begin, size_t bytes);
extern "C" const char* vitkern_counts_take();

namespace {

constexpr int kThreads = 256, kBlocks = 4;

__global__ void copy(const float* from, float* to) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  to[i] = from[i];
}

__global__ void copy_vectors(const float* from, float* to) {
  const int i = 4 * (blockIdx.x * blockDim.x + threadIdx.x);
  float four[4];
  vitkern::load(from + i, four);
  vitkern::store(to + i, four);
}

// Through a tile of 32 x 32 whose rows lie kStride apart.
template <int kStride>
__global__ void transpose(const float* from, float* to) {
  __shared__ float tile[32 * kStride];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int row = warp; row < 32; row += 8) tile[row * kStride + lane] = from[row * 32 + lane];
  __syncthreads();
  for (int row = warp; row < 32; row += 8) to[row * 32 + lane] = tile[lane * kStride + row];
}

__global__ void strided(const float* from, float* to, int stride) {
  to[threadIdx.x] = from[stride * threadIdx.x];
}

__global__ void add_to_one(float* sum) { atomicAdd(sum, 1.0f); }

__global__ void add_rows(float* rows) {
  const float ones[4] = {1, 1, 1, 1};
  vitkern::atomic_add(rows, threadIdx.x, ones);
}

// Eight lanes to a row of 128 bytes; rows 0, 7, 14 and so on.
__global__ void gather(const float* rows, float* to) {
  float four[4];
  vitkern::load(rows + threadIdx.x / 8 * 7 * 32 + threadIdx.x % 8 * 4, four);
  vitkern::store(to + 4 * threadIdx.x, four);
}

// A warp reads 64 lines, one after the other, twice.
__global__ void read_twice(const float* from, float* to) {
  float sum = 0;
  for (int i = 0; i < 128; ++i) sum += from[i % 64 * 32 + threadIdx.x];
  to[threadIdx.x] = sum;
}

// A lane goes round as often as its number says, and reads in every other round.
__global__ void uneven(const float* from, float* to) {
  float sum = 0;
  for (int i = 0; i < static_cast<int>(threadIdx.x % 32); ++i)
    if ((i + threadIdx.x) % 2 == 0) sum += from[i];
  to[threadIdx.x] = sum;
}

// Half of the lanes take each way, through the same function.
__device__ float twice(const float* from) { return 2 * *from; }
__global__ void two_ways_of_calling(const float* from, float* to) {
  float number;
  if (threadIdx.x % 2) {
    number = twice(from + threadIdx.x);
  } else {
    number = twice(from + threadIdx.x) + 1;
  }
  to[threadIdx.x] = number;
}

__global__ void copy_and_multiply(const __half* from, float* to) {
  alignas(16) __shared__ __half rows[16 * 24];  // of 16, and 8 to spare: in other banks
  if (threadIdx.x >= 32) return;
  const int row = threadIdx.x / 2, half = threadIdx.x % 2 * 8;
  vitkern::copy_async(rows + row * 24 + half, from + row * 16 + half, true);
  vitkern::wait_for_copies();
  __syncwarp();
  uint32_t a[4];
  vitkern::load_matrices<false>(a, rows + threadIdx.x % 16 * 24 + threadIdx.x / 16 * 8);
  float sums[4] = {};
  vitkern::multiply_add_tile<__half>(sums, a, a[0], a[1]);
  to[threadIdx.x] = sums[0];
}

// The last three quarters of the warp only clear their part of shared memory.
__global__ void copy_some(const float* from, float* to) {
  __shared__ uint4 rows[32];
  vitkern::copy_async(rows + threadIdx.x, from + 4 * threadIdx.x, threadIdx.x < 8);
  vitkern::wait_for_copies();
  to[threadIdx.x] = __uint_as_float(rows[threadIdx.x].x);
}

template <typename... Given, typename... Arguments>
void run(const char* name, void (*kernel)(Given...), int blocks, int threads, const Arguments&... arguments) {
  std::vector<float> from(1 << 16, 1.0f), to(1 << 16);
  vitkern_counts_name("from", from.data(), from.size() * sizeof(float));
  vitkern_counts_name("to", to.data(), to.size() * sizeof(float));
  if constexpr (sizeof...(Given) - sizeof...(Arguments) == 2) {
    using From = std::tuple_element_t<0, std::tuple<Given...>>;
    launch(name, kernel, dim3(blocks), dim3(threads), 0, nullptr, reinterpret_cast<From>(from.data()),
           to.data(), arguments...);
  } else {
    launch(name, kernel, dim3(blocks), dim3(threads), 0, nullptr, to.data());
  }
  std::printf("%s\n", vitkern_counts_take());
}

}  // namespace

int main() {
  run("copy", copy, kBlocks, kThreads);
  run("copy_vectors", copy_vectors, kBlocks, kThreads);
  run("transpose_1", transpose<33>, 1, kThreads);
  run("transpose_2", transpose<34>, 1, kThreads);
  run("transpose_32", transpose<32>, 1, kThreads);
  run("stride_2", strided, 1, kThreads, 2);
  run("stride_32", strided, 1, kThreads, 32);
  run("add_to_one", add_to_one, kBlocks, kThreads);
  run("add_rows", add_rows, kBlocks, kThreads);
  run("gather", gather, 1, kThreads);
  run("read_twice", read_twice, 1, 32);
  run("uneven", uneven, 1, 32);
  run("two_ways_of_calling", two_ways_of_calling, 1, 32);
  run("copy_some", copy_some, 1, 32);
  run("copy_and_multiply", copy_and_multiply, 1, 32);
}
