// SPDX-License-Identifier: Apache-2.0
// Elements of any type as numbers of their accumulator type, 16 bytes at a time where the type and
// the count allow.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/launch.cuh"

namespace vitkern {

constexpr int kVectorBytes = 16;

__host__ __device__ inline bool aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % kVectorBytes == 0;
}

template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T narrow(Accumulator<T> x) {
  return x;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

template <typename T, int kCount>
struct alignas(kCount * sizeof(T)) Vector {
  T at[kCount];
};

// Reads kCount consecutive elements that nothing writes during the kernel: one load of 16 bytes,
// or one element.
template <int kCount, typename T>
__device__ __forceinline__ void load(const T* address, Accumulator<T> (&out)[kCount]) {
  if constexpr (kCount == 1) {
    out[0] = widen(__ldg(address));
  } else {
    static_assert(kCount * sizeof(T) == kVectorBytes);
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(address));
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      // A bfloat16 is the upper half of a float: one shift or mask each, where a conversion first
      // extracts the half.
      const unsigned words[] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        out[i] = __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
    } else {
      Vector<T, kCount> vector;
      memcpy(&vector, &bits, sizeof vector);
#pragma unroll
      for (int i = 0; i < kCount; ++i) out[i] = widen(vector.at[i]);
    }
  }
}

// The same, counted in vectors of kCount elements from `first`.
template <int kCount, typename T>
__device__ __forceinline__ void load_vector(const T* first, uint32_t vector, Accumulator<T> (&out)[kCount]) {
  load((reinterpret_cast<const Vector<T, kCount>*>(first) + vector)->at, out);
}

template <int kCount, typename T>
__device__ __forceinline__ void store(T* address, const Accumulator<T> (&in)[kCount]) {
  Vector<T, kCount> vector;
#pragma unroll
  for (int i = 0; i < kCount; ++i) vector.at[i] = narrow<T>(in[i]);
  *reinterpret_cast<Vector<T, kCount>*>(address) = vector;
}

}  // namespace vitkern
