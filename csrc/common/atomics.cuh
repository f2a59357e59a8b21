// SPDX-License-Identifier: Apache-2.0
// Atomic addition of several neighbours, in the widest pieces that the architecture has.
#pragma once

#include "common/launch.cuh"

namespace vitkern {

// Adds kCount numbers to the vector of as many that lies `vector` such vectors from `first`. On sm_90 and
// later four floats go in one reduction, for which vectors of them are aligned; doubles and older cards go
// one by one.
template <int kCount, typename A>
__device__ __forceinline__ void atomic_add(A* first, uint32_t vector, const A (&addends)[kCount]) {
  struct Numbers {
    A at[kCount];
  };
  A* address = reinterpret_cast<Numbers*>(first)[vector].at;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr int kWidth = sizeof(A) == sizeof(float) && kCount % 4 == 0 ? 4 : 1;
#else
  constexpr int kWidth = 1;
#endif
#pragma unroll
  for (int i = 0; i < kCount; i += kWidth) {
    if constexpr (kWidth == 4) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
      asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(
                       __cvta_generic_to_global(address + i)),
                   "f"(addends[i]), "f"(addends[i + 1]), "f"(addends[i + 2]), "f"(addends[i + 3])
                   : "memory");
#endif
    } else {
      atomicAdd(address + i, addends[i]);
    }
  }
}

}  // namespace vitkern
