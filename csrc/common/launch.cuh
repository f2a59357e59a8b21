// SPDX-License-Identifier: Apache-2.0
// Starting CUDA kernels: the right device, the caller's stream, and no error that goes unheard. The one place
// that knows whether a GPU or the emulator runs them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#ifdef VITKERN_EMULATED
#include "emulator/cuda_emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define VITKERN_DYNAMIC_SHARED(TYPE, NAME)                      \
  extern __shared__ __align__(16) unsigned char NAME##_bytes[]; \
  TYPE* NAME = reinterpret_cast<TYPE*>(NAME##_bytes)
#endif

namespace vitkern {

// The runtime keeps the error for the next call on this thread. It is reported here, so it is cleared.
inline void check_cuda(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string("vitkern: ") + doing + ": " + cudaGetErrorString(error));
}

#ifdef VITKERN_EMULATED
struct DeviceGuard {
  explicit DeviceGuard(int) {}
};
#else
template <typename Function>
Function driver_function(const char* name) {
  void* address = nullptr;
#if CUDART_VERSION >= 12050
  constexpr unsigned kVersion = 11000;  // the version of the function's signature
  check_cuda(cudaGetDriverEntryPointByVersion(name, &address, kVersion, cudaEnableDefault), name);
#else
  check_cuda(cudaGetDriverEntryPoint(name, &address, cudaEnableDefault), name);
#endif
  if (!address) throw std::runtime_error(std::string("vitkern: the CUDA driver has no ") + name);
  return reinterpret_cast<Function>(address);
}

// The context of the calling thread, by the driver, which creates none. Each returns 0 or an error.
struct ThreadContext {
  int (*device)(int*) = driver_function<int (*)(int*)>("cuCtxGetDevice");
  int (*get)(void**) = driver_function<int (*)(void**)>("cuCtxGetCurrent");
  int (*set)(void*) = driver_function<int (*)(void*)>("cuCtxSetCurrent");

  static const ThreadContext& functions() {
    static const ThreadContext found;
    return found;
  }
};

// Makes `device` current for a scope. Switching costs, so it is done only where another one is current, or
// none. Then the thread gets back the context that it had, maybe none, and not its device: from CUDA 12 on
// cudaSetDevice creates the context of a device without one, some 500 MB on GPU 0 for each process that works
// on another GPU.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    int current = 0;
    switched_ = thread_.device(&current) != 0 || current != device;
    if (!switched_) return;
    thread_.get(&before_);
    check_cuda(cudaSetDevice(device), ("cudaSetDevice(" + std::to_string(device) + ")").c_str());
  }
  ~DeviceGuard() {
    if (switched_) thread_.set(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  const ThreadContext& thread_ = ThreadContext::functions();
  void* before_ = nullptr;
  bool switched_;
};

inline std::string launch_failure(const char* name, dim3 grid, dim3 block, size_t shared_bytes,
                                  cudaError_t error) {
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  std::string text = std::string("vitkern: kernel ") + name + " <<<(" + std::to_string(grid.x) + ", " +
                     std::to_string(grid.y) + ", " + std::to_string(grid.z) + "), " +
                     std::to_string(block.x * block.y * block.z) + ", " + std::to_string(shared_bytes) +
                     " bytes>>> on device " + std::to_string(device) + ": " + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice) {
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    text += std::string("; this build has code for ") + VITKERN_CUDA_ARCHITECTURES + ", the card is " +
            std::to_string(major) + std::to_string(minor) + ": rebuild with VITKERN_CUDA_ARCHITECTURES";
  }
  return text;
}
#endif

inline int64_t blocks_of(int64_t items, int64_t of_block) { return (items + of_block - 1) / of_block; }

constexpr int64_t kBlocksWanted = 512;  // keeps the largest cards busy, if blocks are all that counts

// For the first axis of a grid, the only one that can be long.
inline unsigned grid_blocks(int64_t blocks) {
  if (blocks > 0x7fffffff) throw std::runtime_error("vitkern: more than 2^31 - 1 blocks");
  return static_cast<unsigned>(blocks);
}

constexpr size_t kSharedBytes = 48 << 10;           // that every kernel may use; more is asked for
constexpr size_t kSharedBytesOfAnyCard = 99 << 10;  // that can be asked for on all cards from sm_80 on

// The most shared memory that a block can have on the current device.
inline size_t most_shared_bytes() {
#ifdef VITKERN_EMULATED
  return kSharedBytesOfAnyCard;
#else
  int device = 0, most = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             "cudaDeviceGetAttribute");
  return most;
#endif
}

#ifndef VITKERN_EMULATED
// Lets a kernel have all the shared memory of a block; each thread asks for it once for a device. The need of
// one launch would not do: the limit is one for all threads, and another may need more at the same time.
inline void allow_most_shared_bytes(const char* name, const void* kernel) {
  static thread_local std::set<std::pair<const void*, int>> allowed;
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  if (allowed.count({kernel, device})) return;
  const int most = static_cast<int>(most_shared_bytes());  // such kernels have no static shared memory
  const std::string doing = std::to_string(most) + " bytes of shared memory for kernel " + name;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), doing.c_str());
  allowed.insert({kernel, device});
}
#endif

// Only the launch itself says how it went: what the thread's last error was before is not this kernel's.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            void* stream, const Arguments&... arguments) {
#ifdef VITKERN_EMULATED
  (void)stream;
  emulator::launch(name, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
                   [&]() VITKERN_UNSEEN {
                     const emulator::races::Recording its_accesses(true);
                     kernel(arguments...);
                   });
#else
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > kSharedBytes) allow_most_shared_bytes(name, function);
  const cudaError_t error = [&](Parameters... given) {
    void* addresses[] = {&given...};
    return cudaLaunchKernel(function, grid, block, addresses, shared_bytes,
                            static_cast<cudaStream_t>(stream));
  }(arguments...);
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(launch_failure(name, grid, block, shared_bytes, error));
#endif
}

// Hides the pointer's origin: the compiler would otherwise keep base and offset in registers and add them again at each
// use.
template <typename T>
__device__ __forceinline__ T* opaque(T* pointer) {
#ifdef __CUDA_ARCH__
  asm("" : "+l"(pointer));
#endif
  return pointer;
}

// For a pointer into shared memory, which stays known as one.
template <typename T>
__device__ __forceinline__ T* opaque_shared(T* pointer) {
#ifdef __CUDA_ARCH__
  unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(pointer));
  asm("" : "+r"(address));
  return static_cast<T*>(__cvta_shared_to_generic(address));
#else
  return pointer;
#endif
}

}  // namespace vitkern
