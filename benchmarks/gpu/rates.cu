// SPDX-License-Identifier: Apache-2.0
// Kernels that do one thing as often as a card can, in the ways of our own kernels: load rows of 128 bytes, add to
// them, load from shared memory what other lanes load too, and follow a chain. rates.py starts them and divides.
#include "common/atomics.cuh"

#ifdef VITKERN_EMULATED
#define __ldcg __ldg  // it has no caches
#endif

namespace rates {

constexpr int kThreads = 256, kWarp = 32;
constexpr int kBlocks = 8;  // of a multiprocessor at a time
constexpr int kLanes = 8;   // of a row: 16 bytes each
constexpr int kAtOnce = 8;  // rows that a team asks for before it waits
constexpr int kSharedAtOnce = 4;
constexpr uint32_t kWords = kWarp * kSharedAtOnce;  // of 16 bytes in shared memory: 2 KB

// `rows` is a power of two. Each turn of each team has another row, in no order; teams of a warp never have the same one,
// unless there are fewer than four.
__device__ __forceinline__ uint32_t row_of(uint32_t turn, uint32_t rows) {
  turn *= 0x9e3779b1u;
  turn = (turn ^ turn >> 15) * 0x85ebca77u;
  const uint32_t of_warp = threadIdx.x / kLanes % (kWarp / kLanes);
  return ((turn ^ turn >> 13) & ~3u | of_warp) & (rows - 1);
}

// kPastL1: as asynchronous copies read, from L2; otherwise as `load` of common/vec.cuh does.
template <bool kPastL1>
__device__ __forceinline__ uint4 read(const uint4* address) {
  if constexpr (kPastL1) {
    return __ldcg(address);
  } else {
    return __ldg(address);
  }
}

// A turn has kAtOnce rows, kStride apart, so that one row is drawn for all: to draw each would take longer than L1 does.
template <bool kPastL1, int kStride>
__global__ void __launch_bounds__(kThreads, kBlocks)
    gather_rows(const uint4* from, uint32_t rows, uint32_t turns, uint32_t* out) {
  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x, team = thread / kLanes;
  uint32_t sum = 0;
  for (uint32_t turn = 0; turn < turns; ++turn) {
    const uint4* own = from + (row_of(team * turns + turn, rows) * kLanes + thread % kLanes);
    uint4 words[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) words[i] = read<kPastL1>(own + i * kStride * kLanes);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) sum ^= words[i].x ^ words[i].y ^ words[i].z ^ words[i].w;
  }
  out[thread] = sum;
}

__global__ void __launch_bounds__(kThreads, kBlocks) add_to_rows(float* to, uint32_t rows, uint32_t turns) {
  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x, team = thread / kLanes, lane = thread % kLanes;
  const float ones[4] = {1, 1, 1, 1};
  for (uint32_t turn = 0; turn < turns; ++turn)
    vitkern::atomic_add(to, row_of(team * turns + turn, rows) * kLanes + lane, ones);
}

// A volatile load: the compiler would leave out three of the four words, which nothing adds up.
__device__ __forceinline__ uint32_t first_of(const uint4* address) {
#ifdef VITKERN_EMULATED
  const uint4 word = *address;
  return word.x;
#else
  uint4 word;
  asm volatile("ld.volatile.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(address))));
  return word.x;
#endif
}

// `alike` neighbours read the same 16 bytes: a warp reads 32 / alike different ones.
__global__ void __launch_bounds__(kThreads, kBlocks)
    read_shared(const uint4* from, uint32_t alike, uint32_t turns, uint32_t* out) {
  __shared__ uint4 words[kWords];
  if (threadIdx.x < kWords) words[threadIdx.x] = from[threadIdx.x];
  __syncthreads();
  const uint4* own = words + threadIdx.x % kWarp / alike;
  uint32_t sum = 0;
#pragma unroll 1
  for (uint32_t turn = 0; turn < turns; ++turn) {
#pragma unroll
    for (int i = 0; i < kSharedAtOnce; ++i) sum += first_of(own + i * kWarp);
  }
  out[blockIdx.x * kThreads + threadIdx.x] = sum;
}

// A line holds the address of the next one. The chain goes on where the last launch left it.
template <bool kPastL1>
__global__ void follow(uint64_t* where, uint32_t steps) {
  using Address = unsigned long long;
  Address at = *where;
  for (uint32_t step = 0; step < steps; ++step) {
    const Address* line = reinterpret_cast<const Address*>(at);
    if constexpr (kPastL1) {
      at = __ldcg(line);
    } else {
      at = __ldg(line);
    }
  }
  *where = at;
}

// Null, or what went wrong.
template <typename... Parameters, typename... Arguments>
const char* start(const char* name, void (*kernel)(Parameters...), uint32_t blocks, uint32_t threads,
                  void* stream, Arguments... arguments) {
  static thread_local std::string said;
  try {
    vitkern::launch(name, kernel, dim3(blocks), dim3(threads), 0, stream, arguments...);
    return nullptr;
  } catch (const std::exception& error) {
    said = error.what();
    return said.c_str();
  }
}

}  // namespace rates

// For Python.
#define VITKERN_RATE extern "C" __attribute__((visibility("default"))) const char*

VITKERN_RATE gather_l1(uint32_t blocks, void* stream, const uint4* from, uint32_t rows, uint32_t turns,
                       uint32_t* out) {
  return rates::start("gather_l1", rates::gather_rows<false, 16>, blocks, rates::kThreads, stream, from, rows,
                      turns, out);
}

VITKERN_RATE gather_l2(uint32_t blocks, void* stream, const uint4* from, uint32_t rows, uint32_t turns,
                       uint32_t* out) {
  return rates::start("gather_l2", rates::gather_rows<true, 512>, blocks, rates::kThreads, stream, from, rows,
                      turns, out);
}

VITKERN_RATE add_to_rows(uint32_t blocks, void* stream, float* to, uint32_t rows, uint32_t turns) {
  return rates::start("add_to_rows", rates::add_to_rows, blocks, rates::kThreads, stream, to, rows, turns);
}

VITKERN_RATE read_shared(uint32_t blocks, void* stream, const uint4* from, uint32_t alike, uint32_t turns,
                         uint32_t* out) {
  return rates::start("read_shared", rates::read_shared, blocks, rates::kThreads, stream, from, alike, turns,
                      out);
}

VITKERN_RATE follow_l1(void* stream, uint64_t* where, uint32_t steps) {
  return rates::start("follow_l1", rates::follow<false>, 1, 1, stream, where, steps);
}

VITKERN_RATE follow_l2(void* stream, uint64_t* where, uint32_t steps) {
  return rates::start("follow_l2", rates::follow<true>, 1, 1, stream, where, steps);
}
