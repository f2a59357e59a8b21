// SPDX-License-Identifier: Apache-2.0
// Combines the lanes of a warp, which the emulator runs one after the other: the accesses of each lane since the lanes
// last met become those of the warp, instruction by instruction.
//
// A card runs one instruction at a time for the lanes that are at it. Which lanes are is settled here by the rule of
// the lowest place: of all lanes the ones go on that are furthest behind in the code, and those at the same place go
// together. Compiled without optimisation, code lies in the order of the source. So lanes that skip a branch wait at
// its end, and lanes that have left a loop wait behind it: they come together where the source says that they can.
// A place is the path of calls that lead to it and where it lies in the code.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "emulator/races.h"

namespace emulator::counts {

// A call enters a function; a step begins a straight piece of code.
enum class Kind : uint8_t { kCall, kStep, kLoad, kStore, kReduction, kCopyFrom, kCopyTo };

struct Event {
  uintptr_t address;
  uint32_t place;
  uint16_t path;
  Kind kind;
  uint8_t bytes;

  bool same_place(const Event& other) const {
    return place == other.place && path == other.path && kind == other.kind;
  }
};

// The paths of calls that have come up, by number; 0 is that of who calls the kernel.
class Paths {
 public:
  // A function that begins at `entry` is called at `place`.
  uint16_t called(uint16_t from, uint32_t place, uint32_t entry) {
    const auto [found, added] = numbers_.insert({{from, place}, static_cast<uint16_t>(paths_.size())});
    if (added) {
      std::vector<uint32_t> path = paths_[from];
      path.push_back(place);
      paths_.push_back(std::move(path));
      before_.push_back(from);
      entries_.push_back(entry);
      const auto at = std::lower_bound(known_.begin(), known_.end(), entry);
      if (at == known_.end() || *at != entry) known_.insert(at, entry);
    }
    return found->second;
  }
  // Whether a place is in the function that the path leads to: a function takes steps after it has announced its end.
  bool leads_to(uint16_t path, uint32_t place) const {
    const auto after = std::upper_bound(known_.begin(), known_.end(), place);
    return after != known_.begin() && *(after - 1) == entries_[path];
  }
  uint16_t returned(uint16_t from) const { return before_[from]; }
  size_t size() const { return paths_.size(); }

  // Whether `one` comes before `other` in the code.
  bool less(const Event& one, const Event& other) const {
    if (one.path == other.path)
      return one.place != other.place ? one.place < other.place : one.kind < other.kind;
    const auto &left = paths_[one.path], &right = paths_[other.path];
    for (size_t i = 0;; ++i) {
      const bool left_ends = i == left.size(), right_ends = i == right.size();
      const uint32_t mine = left_ends ? one.place : left[i], its = right_ends ? other.place : right[i];
      if (mine != its) return mine < its;
      if (left_ends || right_ends) return right_ends && !left_ends;
    }
  }

 private:
  std::map<std::pair<uint16_t, uint32_t>, uint16_t> numbers_;
  std::vector<std::vector<uint32_t>> paths_{{}};
  std::vector<uint16_t> before_{0};
  std::vector<uint32_t> entries_{0}, known_;
};

using Traces = std::array<std::vector<Event>, kWarpLanes>;

// Calls use(lanes, events) for each instruction of the warp: which lanes, and the event of each. Empties the traces.
template <typename Use>
void replay(Traces& traces, const Paths& paths, const Use& use) {
  std::array<size_t, kWarpLanes> next{};
  std::array<const Event*, kWarpLanes> heads{};
  for (;;) {
    const Event* first = nullptr;
    unsigned lanes = 0;
    for (int lane = 0; lane < kWarpLanes; ++lane) {
      if (next[lane] == traces[lane].size()) continue;
      const Event& head = traces[lane][next[lane]];
      heads[lane] = &head;
      if (first && head.same_place(*first)) {
        lanes |= 1u << lane;
      } else if (!first || paths.less(head, *first)) {
        first = &head, lanes = 1u << lane;
      }
    }
    if (!first) break;
    use(lanes, heads);
    for (int lane = 0; lane < kWarpLanes; ++lane) next[lane] += lanes >> lane & 1u;
  }
  for (auto& trace : traces) trace.clear();
}

}  // namespace emulator::counts
