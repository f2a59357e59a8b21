// SPDX-License-Identifier: Apache-2.0
// Atomic addition of several neighbours, in the widest pieces that the architecture has.
#pragma once

#include "common/launch.cuh"

namespace vitkern {

#if (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900) || defined(VITKERN_EMULATED)
constexpr int kFloatsAtOnce = 4;  // of one reduction, for which they are aligned
#else
constexpr int kFloatsAtOnce = 1;
#endif

#ifdef VITKERN_EMULATED
using ::add_four_floats;
#else
__device__ __forceinline__ void add_four_floats(float* address, const float* addends) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)),
      "f"(addends[0]), "f"(addends[1]), "f"(addends[2]), "f"(addends[3])
      : "memory");
#endif
}
#endif

// Adds kCount numbers to the vector of as many that lies `vector` such vectors from `first`. On sm_90 and
// later four floats go in one reduction, for which vectors of them are aligned; doubles and older cards go
// one by one.
template <int kCount, typename A>
__device__ __forceinline__ void atomic_add(A* first, uint32_t vector, const A (&addends)[kCount]) {
  struct Numbers {
    A at[kCount];
  };
  A* address = reinterpret_cast<Numbers*>(first)[vector].at;
  constexpr int kWidth = sizeof(A) == sizeof(float) && kCount % 4 == 0 ? kFloatsAtOnce : 1;
#pragma unroll
  for (int i = 0; i < kCount; i += kWidth) {
    if constexpr (kWidth == 4) {
      add_four_floats(address + i, addends + i);
    } else {
      atomicAdd(address + i, addends[i]);
    }
  }
}

}  // namespace vitkern
