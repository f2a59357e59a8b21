// SPDX-License-Identifier: Apache-2.0
// The order of two accesses of a launch, and the shadow memory from which it is found.
//
// Two accesses to the same bytes race if they are not ordered, one of them writes, and not both are atomic. Order
// comes from a launch's begin and end, from the program of one thread, from a barrier of the block for all of its
// threads, and from __syncwarp for the lanes of its mask. Shuffles, votes, products of a warp and atomics make none,
// and blocks are never ordered. A copy by cp.async is an access at any time from its issue to its thread's wait: it
// must come after all accesses that were before it and is before what comes after the wait.
//
// Why two numbers suffice. Barriers of a block order everything before with everything after, so a block's time falls
// into epochs: an access of an earlier epoch of the block is ordered before any of a later one. In an epoch threads of
// different warps have no order at all. In a warp each lane keeps a vector clock: lanes[i] is the last number of lane
// i that came before. __syncwarp gives each lane of its mask the largest of all, and then each raises its own number.
// So access (block, epoch, thread, own number n) is before a thread's present iff it is of the same block and
// of an earlier epoch, or of the same epoch and warp and n <= lanes[its lane]. See ordered().
//
// The shadow of each two bytes: the last write, and the reads and atomic updates since then. A later access that is
// ordered after the write is ordered after all that the write was ordered after, and where it was not, that is
// reported already. The shadow keeps one read of another warp or block, which no write of this block's epoch can be
// ordered after, and the reads of one warp's lanes. The same for updates. See Accesses.
#pragma once

#include <array>
#include <memory>
#include <unordered_map>

#include "emulator/races.h"

namespace emulator::races {

struct Record {
  uint32_t block = 0;  // 0: there is none
  uint32_t epoch = 0, number = 0;
  uint32_t caller = 0;  // from where this module lies
  uint16_t thread = 0;

  int warp() const { return thread / kWarpLanes; }
  int lane() const { return thread % kWarpLanes; }
};

inline bool ordered(const Record& access, const Clock& clock) {
  if (access.block != clock.block || access.epoch != clock.epoch)
    return access.block == 0 || (access.block == clock.block && access.epoch < clock.epoch);
  return access.warp() == clock.thread / kWarpLanes && access.number <= clock.lanes[access.lane()];
}

// Accesses of one kind since the last write.
struct Accesses {
  Record first, other;  // of the block that runs, in the last epoch; of another warp of it, or another block
  std::unique_ptr<std::array<Record, kWarpLanes>> lanes;  // of first's warp; of another epoch: none

  void add(const Record& access) {
    if (first.block != access.block || first.epoch != access.epoch) {
      if (first.block != access.block && first.block != 0) other = first;
      if (other.block == access.block) other = {};
      first = access;
    } else if (first.warp() != access.warp()) {
      if (other.block == 0) other = access;
    } else if (first.thread == access.thread) {
      first = access;
    } else {
      if (!lanes) lanes = std::make_unique<std::array<Record, kWarpLanes>>();
      (*lanes)[access.lane()] = access;
    }
  }

  const Record* unordered(const Clock& clock) const {
    if (!ordered(other, clock)) return &other;
    if (!ordered(first, clock)) return &first;
    if (!lanes || first.block == 0) return nullptr;
    for (const Record& access : *lanes)
      if (access.block == first.block && access.epoch == first.epoch && !ordered(access, clock))
        return &access;
    return nullptr;
  }
};

struct Cell {
  Record write;
  Accesses reads;
  std::unique_ptr<Accesses> updates;
};

constexpr uintptr_t kCellBytes = 2, kPageBytes = 1024;
using Page = std::array<Cell, kPageBytes / kCellBytes>;

class Memory {
 public:
  Cell& at(uintptr_t address) {
    const uintptr_t number = address / kPageBytes;
    if (!page_ || number != number_) {
      std::unique_ptr<Page>& page = pages_[number];
      if (!page) page = std::make_unique<Page>();
      page_ = page.get(), number_ = number;
    }
    return (*page_)[address % kPageBytes / kCellBytes];
  }
  void clear() { pages_.clear(), page_ = nullptr; }

 private:
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  Page* page_ = nullptr;
  uintptr_t number_ = 0;
};

}  // namespace emulator::races
