// SPDX-License-Identifier: Apache-2.0
// Memory for the duration of a call. Each fresh page costs a fault, often more than the work on it, so released blocks
// are kept for the next call, up to kMaxKeptBytes in the whole process.
#pragma once

#include <cstddef>
#include <cstdint>

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

// Requests large pages for memory that the caller is about to write: if the memory is fresh, there is a fault for every
// 2 MB instead of every 4 KB, and later reads need fewer translations. This is a hint, which changes only speed.
void prefer_huge_pages(void* data, size_t bytes);

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

// Scratch memory that `lay_out` cuts up. It is called twice: first from a null base, to learn the size.
class Arena {
 public:
  template <typename LayOut>
  explicit Arena(const LayOut& lay_out) : scratch_(measured(lay_out)) {
    Cursor cursor{scratch_.data()};
    lay_out(cursor);
  }

 private:
  template <typename LayOut>
  static size_t measured(const LayOut& lay_out) {
    Cursor cursor{nullptr};
    lay_out(cursor);
    return cursor.used;
  }

  Scratch scratch_;
};

// `count` structures, of which `lay_out` takes the arrays of each.
template <typename Structure, typename LayOut>
Structure* take_each(Cursor& cursor, int64_t count, const LayOut& lay_out) {
  Structure* const structures = cursor.take<Structure>(count);
  Structure unplaced;
  for (int64_t i = 0; i < count; ++i) lay_out(cursor.base ? structures[i] : unplaced);
  return structures;
}

}  // namespace
}  // namespace vitkern::VITKERN_ISA
#endif
