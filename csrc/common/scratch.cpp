// SPDX-License-Identifier: Apache-2.0
#include "common/scratch.h"

#include <cstdint>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace vitkern {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kMaxKeptBlocks = 64;

struct Block {
  void* data;
  size_t bytes;
};

size_t alignment_of(size_t bytes) { return bytes < kHugePage ? kScratchAlignment : kHugePage; }

void release(const Block& block) {
  ::operator delete(block.data, std::align_val_t{alignment_of(block.bytes)});
}

// Leaked on purpose: kernels may still run while static objects are destroyed. The vector never grows beyond
// what is reserved here, so that giving a block back cannot throw.
struct Kept {
  std::mutex mutex;
  std::vector<Block> blocks;
  size_t bytes = 0;

  Kept() { blocks.reserve(kMaxKeptBlocks); }

  void drop_oldest() {
    release(blocks.front());
    bytes -= blocks.front().bytes;
    blocks.erase(blocks.begin());
  }
};

Kept& kept() {
  static Kept& instance = *new Kept;
  return instance;
}

void* allocate(size_t bytes) {
  void* data = ::operator new(bytes, std::align_val_t{alignment_of(bytes)});
  prefer_huge_pages(data, bytes);  // random gathers miss the translation buffers on small ones
  return data;
}

}  // namespace

Scratch::Scratch(size_t bytes) {
  const size_t granule = alignment_of(bytes);
  bytes_ = (bytes / granule + 1) * granule;  // a block of its own even for nothing
  {
    Kept& store = kept();
    const std::lock_guard<std::mutex> lock(store.mutex);
    // The smallest kept block that is large enough without wasting more than half of it.
    auto best = store.blocks.end();
    for (auto block = store.blocks.begin(); block != store.blocks.end(); ++block)
      if (block->bytes >= bytes_ && block->bytes / 2 <= bytes_)
        if (best == store.blocks.end() || block->bytes < best->bytes) best = block;
    if (best != store.blocks.end()) {
      data_ = best->data;
      bytes_ = best->bytes;
      store.bytes -= bytes_;
      store.blocks.erase(best);
      return;
    }
  }
  data_ = allocate(bytes_);
}

Scratch::~Scratch() {
  if (bytes_ > kMaxKeptBytes) {  // it would push out all others and then itself
    release({data_, bytes_});
    return;
  }
  Kept& store = kept();
  const std::lock_guard<std::mutex> lock(store.mutex);
  while (store.bytes + bytes_ > kMaxKeptBytes || store.blocks.size() == kMaxKeptBlocks) store.drop_oldest();
  store.blocks.push_back({data_, bytes_});
  store.bytes += bytes_;
}

char* Scratch::data() const { return static_cast<char*>(data_); }

void prefer_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (address + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace vitkern
