// SPDX-License-Identifier: Apache-2.0
// The part of the CUDA runtime that csrc/common/launch.cuh calls, with two fake devices: the context of each thread,
// the created contexts, errors that stay until they are read, and limits of kernels.
#pragma once

#include <cstddef>
#include <cstring>
#include <map>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define CUDART_VERSION 13000

enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209
};
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum { cudaEnableDefault };
using cudaStream_t = void*;
struct dim3 {
  unsigned x, y = 1, z = 1;
  explicit dim3(unsigned blocks) : x(blocks) {}
};

namespace fake {

constexpr int kDevices = 2, kMostShared = 227 << 10;
struct Context {
  int device;
  bool exists;
};
struct Launch {
  int device;
  long long argument;
};
inline Context contexts[kDevices] = {{0, false}, {1, false}};
inline std::map<std::pair<const void*, int>, int> limits;  // of a kernel on a device
inline std::vector<Launch> launches;
inline int switches = 0, limits_set = 0;
inline thread_local Context* current = nullptr;
inline thread_local int device = 0;  // where there is no context
inline thread_local cudaError_t last = cudaSuccess;

inline cudaError_t fail(cudaError_t error) { return last = error; }

inline int get_device(int* found) { return current ? (*found = current->device, 0) : 201; }
inline int get_context(void** found) { return *found = current, 0; }
inline int set_context(void* wanted) { return current = static_cast<Context*>(wanted), 0; }

}  // namespace fake

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidDevice ? "invalid device ordinal" : "invalid";
}
inline cudaError_t cudaGetLastError() { return std::exchange(fake::last, cudaSuccess); }
inline cudaError_t cudaGetDevice(int* found) {
  return *found = fake::current ? fake::current->device : fake::device, cudaSuccess;
}
inline cudaError_t cudaSetDevice(int wanted) {
  if (wanted >= fake::kDevices) return fake::fail(cudaErrorInvalidDevice);
  ++fake::switches;
  fake::device = wanted;
  fake::current = &fake::contexts[wanted];
  fake::current->exists = true;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  return *value = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? fake::kMostShared : 9, cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  ++fake::limits_set;
  fake::limits[{kernel, fake::current->device}] = bytes;
  return bytes <= fake::kMostShared ? cudaSuccess : fake::fail(cudaErrorInvalidValue);
}
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned, int) {
  const std::map<std::string, void*> functions = {
      {"cuCtxGetDevice", reinterpret_cast<void*>(&fake::get_device)},
      {"cuCtxGetCurrent", reinterpret_cast<void*>(&fake::get_context)},
      {"cuCtxSetCurrent", reinterpret_cast<void*>(&fake::set_context)}};
  return *found = functions.at(name), cudaSuccess;
}
inline cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3, void** arguments, size_t shared,
                                    cudaStream_t) {
  if (grid.x == 0) return fake::fail(cudaErrorInvalidConfiguration);
  const auto limit = fake::limits.find({kernel, fake::current->device});
  if (shared > static_cast<size_t>(limit == fake::limits.end() ? 48 << 10 : limit->second))
    return fake::fail(cudaErrorInvalidValue);
  fake::launches.push_back({fake::current->device, *static_cast<long long*>(arguments[0])});
  return cudaSuccess;
}
