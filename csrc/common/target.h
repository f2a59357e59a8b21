// SPDX-License-Identifier: Apache-2.0
// The device, stream or threads of a pass: the last part of every op's parameters.
#pragma once

#include <cstdint>

namespace vitkern {

struct Target {
  int32_t threads = 0;        // cpu: how many threads may be used
  int32_t device = 0;         // cuda: ordinal
  void* stream = nullptr;     // cuda: cudaStream_t
  void* workspace = nullptr;  // cuda: as many bytes as the pass asks for, 256-byte aligned, not initialised
};

}  // namespace vitkern
