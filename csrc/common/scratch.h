// SPDX-License-Identifier: Apache-2.0
// Memory that a call needs for its own duration. Fresh pages cost a fault each, often more than the work on
// them, so released blocks are kept for the next call, up to kMaxKeptBytes in the whole process.
#pragma once

#include <cstddef>

namespace vitkern {

constexpr size_t kScratchAlignment = 64;
constexpr size_t kMaxKeptBytes = size_t{128} << 20;

class Scratch {
 public:
  explicit Scratch(size_t bytes);  // uninitialised; throws std::bad_alloc
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  char* data() const;

 private:
  void* data_;
  size_t bytes_;
};

}  // namespace vitkern

#if defined(VITKERN_ISA)
namespace vitkern::VITKERN_ISA {
namespace {

// Cuts arrays out of a block. From a null base it only measures: lay out twice, first to learn the size.
struct Cursor {
  char* base;
  size_t used = 0;

  template <typename T>
  T* take(size_t count) {
    char* const array = base ? base + used : nullptr;
    used += (count * sizeof(T) + kScratchAlignment - 1) / kScratchAlignment * kScratchAlignment;
    return reinterpret_cast<T*>(array);
  }
};

}  // namespace
}  // namespace vitkern::VITKERN_ISA
#endif
