// SPDX-License-Identifier: Apache-2.0
// The counts of a launch, by the rules in CUDA's guides: a request of a warp takes the sectors of 32 bytes and the lines
// of 128 bytes that its lanes touch in global memory, and in shared memory one wavefront for each word of 4 bytes that
// the busiest of 32 banks must deliver.
#pragma once

#include <algorithm>
#include <map>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "emulator/l1_model.h"
#include "emulator/warp_replay.h"

namespace emulator::counts {

constexpr int kBanks = 32, kWordBytes = 4, kCopyWords = 4;

// A place in global memory: which tensor, and where in it. So no count depends on where tensors lie.
struct Place {
  int tensor;
  uint64_t offset;
  Place at(uint64_t further) const { return {tensor, offset + further}; }
  uint64_t sector() const { return static_cast<uint64_t>(tensor) << 40 | offset / kSectorBytes; }
};

struct Request {
  Kind kind;
  int bytes;  // of a lane
  int lanes = 0;
  std::array<uint64_t, kWarpLanes> at{};  // of each lane: sector, or offset in shared memory
};

template <typename T>
int64_t distinct(std::vector<T>& values) {
  std::sort(values.begin(), values.end());
  values.erase(std::unique(values.begin(), values.end()), values.end());
  return static_cast<int64_t>(values.size());
}

// The wavefronts of lanes [begin, end): as many as the busiest bank has words to give.
inline int64_t wavefronts(const Request& request, int begin, int end) {
  std::array<uint64_t, kWarpLanes * kCopyWords> words;
  auto last = words.begin();
  for (int lane = begin; lane < std::min(end, request.lanes); ++lane)
    for (int byte = 0; byte < request.bytes; byte += kWordBytes)
      *last++ = (request.at[lane] + byte) / kWordBytes;
  std::sort(words.begin(), last);
  std::array<int, kBanks> of_bank{};
  int most = 0;
  for (auto word = words.begin(), stop = std::unique(words.begin(), last); word < stop; ++word)
    most = std::max(most, ++of_bank[*word % kBanks]);
  return most;
}

struct Global {
  int64_t requests = 0, lanes = 0, sectors = 0, lines = 0;
  uint64_t digest = 0;  // of addresses, and by which warp
};

// Accesses of 8 and 16 bytes go in two and four parts of the warp; whether parts that ask for the same words go as one
// is not documented. `least` lets them, `most` does not.
struct Shared {
  int64_t requests = 0, lanes = 0, least = 0, most = 0;

  void add(const Request& request) {
    const int part = kWarpLanes / std::max(1, request.bytes / kWordBytes);
    ++requests, lanes += request.lanes;
    least += wavefronts(request, 0, kWarpLanes);
    for (int begin = 0; begin < request.lanes; begin += part)
      most += wavefronts(request, begin, begin + part);
  }
};

struct Trips {
  int64_t warps = 0, lanes = 0;
};

struct Misses {
  int64_t sectors = 0, together = 0, one_by_one = 0;  // missed in either order
};

using Key = std::tuple<Kind, int, std::string>;      // kind, bytes of a lane, tensor
using Site = std::tuple<uint32_t, bool, Kind, int>;  // place, whether of shared memory, kind, bytes

// The sums over the blocks that were counted.
struct Tally {
  std::map<Key, Global> global;
  std::map<Key, Shared> shared;
  std::map<Site, Global> sites;
  std::map<uint32_t, Trips> loops;                // by the place of the loop's head
  std::unordered_map<uint64_t, int64_t> adds;     // by sector
  int64_t counted = 0, reductions = 0, left = 0;  // left: different addresses of each block, summed up
  int64_t waits = 0, barriers = 0, outside = 0;   // outside: accesses to what has no name
  std::map<int64_t, Asked> asked;
  std::map<std::string, Misses> l1;
};

inline const char* name_of(Kind kind) {
  static const char* const kNames[] = {"call", "step", "load", "store", "reduction", "copy from", "copy to"};
  return kNames[static_cast<int>(kind)];
}

}  // namespace emulator::counts
