// SPDX-License-Identifier: Apache-2.0
// Hints that bring memory into the cache before it is needed. Any address will do: none of them faults.
#pragma once

#include "common/simd.h"

namespace vitkern::VITKERN_ISA {
namespace {

// One cache line, to be read; prefetch_write: to be written.
VITKERN_INLINE void prefetch(const void* address) {
#if VITKERN_VECTOR_EXTENSION
  __builtin_prefetch(address);
#elif defined(_M_X64)
  _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T0);
#endif
}

VITKERN_INLINE void prefetch_write(const void* address) {
#if VITKERN_VECTOR_EXTENSION
  __builtin_prefetch(address, 1);
#else
  prefetch(address);
#endif
}

// Brings one row into the cache.
template <typename T>
VITKERN_INLINE void prefetch_row(const T* row, int64_t channels) {
  for (int64_t channel = 0; channel < channels; channel += 64 / sizeof(T)) prefetch(row + channel);
}

// The same for a row that is about to be written.
template <typename T>
VITKERN_INLINE void prefetch_row_write(const T* row, int64_t channels) {
  for (int64_t channel = 0; channel < channels; channel += 64 / sizeof(T)) prefetch_write(row + channel);
}

}  // namespace
}  // namespace vitkern::VITKERN_ISA
