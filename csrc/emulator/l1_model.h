// SPDX-License-Identifier: Apache-2.0
// A model of the multiprocessors' L1 caches: finds the loads of global memory that go on to L2.
//
// Lines of 128 bytes in four sectors, 16 ways; the least recently used line is evicted. All warps of a multiprocessor
// take turns, a request each. Stores and reductions bypass the cache. A real card has another order, which differs from
// run to run.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <vector>

namespace emulator::counts {

constexpr int kSectorBytes = 32, kSectorsOfLine = 4;

struct L1Model {
  int multiprocessors = 0, resident = 0;  // none: the model is off
  int64_t bytes = 0;
};

class Cache {
 public:
  explicit Cache(int64_t bytes)
      : sets_(bytes / kSectorBytes / kSectorsOfLine / kWays), slots_(sets_ * kWays) {}

  // How many of the wanted sectors of a line are not there; afterwards they are.
  int misses(uint64_t line, unsigned sectors) {
    Slot* const set = &slots_[(line * 0x9E3779B97F4A7C15ull >> 40) % sets_ * kWays];
    Slot* slot = set;
    for (int way = 0; way < kWays; ++way) {
      if (set[way].sectors && set[way].line == line) {
        slot = set + way;
        break;
      }
      if (set[way].used < slot->used) slot = set + way;
    }
    if (slot->line != line) slot->line = line, slot->sectors = 0;
    const unsigned missing = sectors & ~slot->sectors;
    slot->sectors |= sectors;
    slot->used = ++time_;
    return __builtin_popcount(missing);
  }

 private:
  static constexpr int kWays = 16;
  struct Slot {
    uint64_t line = 0, used = 0;
    unsigned sectors = 0;
  };
  int64_t sets_;
  std::vector<Slot> slots_;
  uint64_t time_ = 0;
};

// The requests of a block's warps: lines with the requested sectors in the lower bits; the first line of each request is
// marked.
struct Asked {
  static constexpr uint64_t kFirst = 1ull << 63;
  std::vector<std::vector<uint64_t>> warps;
};

// The blocks that run on a multiprocessor, and its cache.
class Multiprocessor {
 public:
  explicit Multiprocessor(int64_t bytes) : cache_(bytes) {}

  void begin(const Asked& asked) { running_.push_back({&asked, std::vector<size_t>(asked.warps.size())}); }

  int running() const { return static_cast<int>(running_.size()); }

  // A request of each warp; calls asks(line, sectors, misses). Returns whether there was any.
  template <typename Asks>
  bool turn(const Asks& asks) {
    const auto ended = [&](Running& one) {
      bool any = false;
      for (size_t warp = 0; warp < one.next.size(); ++warp)
        any |= request(one.asked->warps[warp], one.next[warp], asks);
      return !any;
    };
    running_.erase(std::remove_if(running_.begin(), running_.end(), ended), running_.end());
    return !running_.empty();
  }

 private:
  template <typename Asks>
  bool request(const std::vector<uint64_t>& all, size_t& next, const Asks& asks) {
    if (next == all.size()) return false;
    do {
      const uint64_t line = (all[next] & ~Asked::kFirst) >> kSectorsOfLine;
      const unsigned sectors = all[next] & 0xf;
      asks(line, sectors, cache_.misses(line, sectors));
    } while (++next < all.size() && !(all[next] & Asked::kFirst));
    return true;
  }

  struct Running {
    const Asked* asked;
    std::vector<size_t> next;
  };
  Cache cache_;
  std::vector<Running> running_;
};

// Runs all blocks in their order. `together`: a multiprocessor begins several at once, and the next ones when all of
// these have ended; otherwise it begins one whenever one has ended.
template <typename Asks>
void run_l1(const L1Model& model, bool together, const std::map<int64_t, Asked>& blocks, const Asks& asks) {
  std::vector<Multiprocessor> all(model.multiprocessors, Multiprocessor(model.bytes));
  auto next = blocks.begin();
  for (bool any = true; any;) {
    any = false;
    for (Multiprocessor& one : all) {
      if (one.running() == 0 || !together)
        while (one.running() < model.resident && next != blocks.end()) one.begin(next++->second);
      any |= one.turn(asks) || next != blocks.end();
    }
  }
}

}  // namespace emulator::counts
