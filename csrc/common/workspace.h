// SPDX-License-Identifier: Apache-2.0
// The layout of the device memory that the caller allocates for several kernels; it gives the size and the addresses.
#pragma once

#include <cstdint>

namespace vitkern {

class Workspace {
 public:
  explicit Workspace(void* memory) : memory_(static_cast<char*>(memory)) {}

  // The address of the next `bytes`, 256-byte aligned; null where there is no memory and only the size counts.
  void* take(int64_t bytes) {
    char* place = memory_ ? memory_ + size_ : nullptr;
    size_ += (bytes + 255) / 256 * 256;
    return place;
  }
  int64_t size() const { return size_; }

 private:
  char* memory_;
  int64_t size_ = 0;
};

}  // namespace vitkern
