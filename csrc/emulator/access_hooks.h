// SPDX-License-Identifier: Apache-2.0
// The functions that gcc's -fsanitize=thread calls at each access: they hand it to on_access(kind, address, bytes, place
// in the code), which the file that includes this header has.
#pragma once

#include <cstddef>

#define VITKERN_HOOK extern "C" void
#define VITKERN_HOOK_OF(NAME, KIND, BYTES) \
  VITKERN_HOOK NAME(void* address) { on_access(KIND, address, BYTES, __builtin_return_address(0)); }
#define VITKERN_HOOKS_OF(BYTES, READ, WRITE)                 \
  VITKERN_HOOK_OF(__tsan_read##BYTES, READ, BYTES)           \
  VITKERN_HOOK_OF(__tsan_write##BYTES, WRITE, BYTES)         \
  VITKERN_HOOK_OF(__tsan_unaligned_read##BYTES, READ, BYTES) \
  VITKERN_HOOK_OF(__tsan_unaligned_write##BYTES, WRITE, BYTES)
#define VITKERN_RANGE_HOOK(NAME, KIND)                            \
  VITKERN_HOOK NAME(void* address, size_t bytes) {                \
    on_access(KIND, address, bytes, __builtin_return_address(0)); \
  }
#define VITKERN_ACCESS_HOOKS(READ, WRITE)     \
  VITKERN_HOOKS_OF(1, READ, WRITE)            \
  VITKERN_HOOKS_OF(2, READ, WRITE)            \
  VITKERN_HOOKS_OF(4, READ, WRITE)            \
  VITKERN_HOOKS_OF(8, READ, WRITE)            \
  VITKERN_HOOKS_OF(16, READ, WRITE)           \
  VITKERN_RANGE_HOOK(__tsan_read_range, READ) \
  VITKERN_RANGE_HOOK(__tsan_write_range, WRITE)

VITKERN_HOOK __tsan_init() {}
VITKERN_HOOK __tsan_vptr_update(void**, void*) {}
