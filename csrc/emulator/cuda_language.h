// SPDX-License-Identifier: Apache-2.0
// The elements of a kernel's source, defined for the emulator: qualifiers, built-in variables, intrinsics, runtime
// calls. Included by cuda_emulator.h.
#pragma once

#include <exception>
#include <mutex>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static thread_local  // a block stays on one OS thread

#ifdef VITKERN_WATCHED
#undef __forceinline__
#define __forceinline__ inline __attribute__((always_inline))  // a report names the lines that led there
#endif

#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::block_index())
#define blockDim (::emulator::block_extent())
#define gridDim (::emulator::grid_extent())
#define VITKERN_DYNAMIC_SHARED(TYPE, NAME) \
  TYPE* NAME = reinterpret_cast<TYPE*>(::emulator::dynamic_shared(#NAME))

namespace emulator {

// The indices of the running thread, and its launch's extents.
#ifdef VITKERN_WATCHED
__attribute__((const)) uint3 thread_index();
__attribute__((const)) uint3 block_index();
__attribute__((const)) dim3 block_extent();
__attribute__((const)) dim3 grid_extent();
#else
inline uint3 thread_index() { return Block::current().fiber->thread; }
inline uint3 block_index() { return Block::current().index; }
inline dim3 block_extent() { return Block::current().block_dim; }
inline dim3 grid_extent() { return Block::current().grid_dim; }
#endif

inline void* dynamic_shared(const char* name) {
  const races::Recording none(false);
  races::names_dynamic_shared(name);
  return Block::current().dynamic_shared.data();
}

}  // namespace emulator

using std::fma;
using std::max;
using std::min;

// ---- Block and warp

inline void __syncthreads(emulator::Site site = emulator::Site::here()) {
  const emulator::races::Recording none(false);
  emulator::Block::current().sync_threads(site);
}
inline int __syncthreads_and(int predicate, emulator::Site site = emulator::Site::here()) {
  const emulator::races::Recording none(false);
  return emulator::Block::current().sync_threads(site, predicate != 0);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, emulator::Site site = emulator::Site::here()) {
  const emulator::races::Recording none(false);
  emulator::Block::current().meet("__syncwarp", mask, 0, -1, &site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const emulator::races::Recording none(false);
  return static_cast<unsigned>(emulator::Block::current().meet("__ballot_sync", mask, predicate != 0, -1));
}
inline bool __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }

namespace emulator {

// `source_of(lane)` names the lane to read; one outside the segment of `width` lanes means the caller itself.
template <typename T, typename SourceOf>
T shuffle(const char* operation, unsigned mask, T value, int width, const SourceOf& source_of) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const races::Recording none(false);
  const int lane = Block::current().fiber->index % kWarpLanes, segment = lane / width * width;
  const int wanted = source_of(lane - segment);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits =
      Block::current().meet(operation, mask, bits, wanted >= 0 && wanted < width ? segment + wanted : lane);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulator

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return emulator::shuffle("__shfl_sync", mask, value, width, [&](int) { return source & (width - 1); });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32) {
  return emulator::shuffle("__shfl_xor_sync", mask, value, width, [&](int lane) { return lane ^ flip; });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int distance, int width = 32) {
  return emulator::shuffle("__shfl_up_sync", mask, value, width, [&](int lane) { return lane - distance; });
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int distance, int width = 32) {
  return emulator::shuffle("__shfl_down_sync", mask, value, width, [&](int lane) { return lane + distance; });
}

// ---- Memory and arithmetic

template <typename T>
__forceinline__ T __ldg(const T* address) {
  return *address;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
inline double __dmul_rn(double a, double b) { return a * b; }

namespace emulator {

template <typename Bits, typename T, typename Sum>
VITKERN_UNSEEN T exchange(T* address, const Sum& sum) {
  static_assert(sizeof(Bits) == sizeof(T));
  Bits* word = reinterpret_cast<Bits*>(address);
  Bits before = __atomic_load_n(word, __ATOMIC_RELAXED), after;
  T value;
  do {
    std::memcpy(&value, &before, sizeof value);
    const T next = sum(value);
    std::memcpy(&after, &next, sizeof after);
  } while (!__atomic_compare_exchange_n(word, &before, after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return value;
}

template <typename Bits, typename T, typename Sum>
VITKERN_UNSEEN T atomic_update(T* address, const void* caller, const Sum& sum) {
  const races::Recording none(false);
  Block::current().may_switch();
  races::sees(races::Access::kUpdate, address, sizeof(T), caller);
  return exchange<Bits>(address, sum);
}

}  // namespace emulator

VITKERN_CALLED int atomicAdd(int* address, int addend) {
  return emulator::atomic_update<uint32_t>(address, VITKERN_CALLER,
                                           [=](int value) { return value + addend; });
}
VITKERN_CALLED float atomicAdd(float* address, float addend) {
  return emulator::atomic_update<uint32_t>(address, VITKERN_CALLER,
                                           [=](float value) { return value + addend; });
}
VITKERN_CALLED double atomicAdd(double* address, double addend) {
  return emulator::atomic_update<uint64_t>(address, VITKERN_CALLER,
                                           [=](double value) { return value + addend; });
}
VITKERN_CALLED __half atomicAdd(__half* address, __half addend) {
  return emulator::atomic_update<uint16_t>(address, VITKERN_CALLER, [=](__half value) {
    return __float2half_rn(__half2float(value) + __half2float(addend));
  });
}
VITKERN_CALLED __nv_bfloat16 atomicAdd(__nv_bfloat16* address, __nv_bfloat16 addend) {
  return emulator::atomic_update<uint16_t>(address, VITKERN_CALLER, [=](__nv_bfloat16 value) {
    return __float2bfloat16_rn(__bfloat162float(value) + __bfloat162float(addend));
  });
}

// Four floats in one reduction, as red.global.add.v4.f32 of sm_90; each of them is added atomically.
VITKERN_CALLED void add_four_floats(float* address, const float* addends) {
  const emulator::races::Recording none(false);
  emulator::Block::current().may_switch();
  emulator::races::sees(emulator::races::Access::kUpdate, address, 4 * sizeof(float), VITKERN_CALLER);
  for (int i = 0; i < 4; ++i)
    emulator::exchange<uint32_t>(address + i, [=](float value) { return value + addends[i]; });
}

// ---- The runtime: one device, no waiting

namespace emulator {

// Runs the blocks of a grid, spread over OpenMP threads; with the race detector one after the other, in an order that a
// seed draws. Throws the first failure.
inline void launch(const char* kernel, const void* function, dim3 grid, dim3 block, size_t shared_bytes,
                   const std::function<void()>& body) {
  const int64_t threads = int64_t{block.x} * block.y * block.z, blocks = int64_t{grid.x} * grid.y * grid.z;
  if (threads < 1 || threads > 1024 || blocks < 1 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535 || shared_bytes > (227u << 10))
    throw std::runtime_error(std::string("emulated kernel ") + kernel + ": impossible launch configuration");
  std::exception_ptr error;
  std::mutex error_guard;
  const auto run = [&](int64_t i) {
    const uint3 index{static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                      static_cast<unsigned>(i / grid.x / grid.y)};
    try {
      Block::current().run(kernel, grid, block, index, shared_bytes, body);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(error_guard);
      if (!error) error = std::current_exception();
    }
  };
#ifdef VITKERN_WATCHED
  const std::lock_guard<std::mutex> one_launch(races::one_launch());
  races::launch_begins(kernel, function, blocks);
  for (const int64_t i : races::order_of_blocks(blocks)) run(i);
#else
#pragma omp parallel for schedule(dynamic)
  for (int64_t i = 0; i < blocks; ++i) run(i);
#endif
  const std::string found = races::launch_ends();
  if (error) std::rethrow_exception(error);
  if (!found.empty()) throw std::runtime_error(found);
}

}  // namespace emulator

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* address, int byte, size_t bytes, cudaStream_t) {
  emulator::races::fills(bytes);
  return std::memset(address, byte, bytes), cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
