// SPDX-License-Identifier: Apache-2.0
// Atomic addition of several neighbours, in the widest pieces that the architecture has.
#pragma once

#include "common/launch.cuh"

namespace vitkern {

// Adds kCount numbers to as many consecutive ones. On sm_90 and later four floats go in one reduction, which wants
// 16-byte alignment where kCount is a multiple of 4; doubles and older cards go one by one.
template <int kCount, typename A>
__device__ __forceinline__ void atomic_add(A* address, const A (&addends)[kCount]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (sizeof(A) == sizeof(float) && kCount % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4)
      asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address + i)),
                   "f"(addends[i]), "f"(addends[i + 1]), "f"(addends[i + 2]), "f"(addends[i + 3])
                   : "memory");
    return;
  }
#endif
#pragma unroll
  for (int i = 0; i < kCount; ++i) atomicAdd(address + i, addends[i]);
}

}  // namespace vitkern
