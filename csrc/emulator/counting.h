// SPDX-License-Identifier: Apache-2.0
// The counter's state of the running launch, and the counting of the threads' accesses. counts.cpp feeds it.
#pragma once

#include "emulator/tally.h"
#include "emulator/watched.h"

namespace emulator::counts {

struct Lane {
  uint16_t path = 0;
  std::vector<uint32_t> last;  // step, by path
};

struct Warp {
  Traces traces;
  std::array<Lane, kWarpLanes> lanes;
  bool loads = false;  // since its last meeting
  int64_t waits = 0;
};

struct Launch {
  std::string kernel;
  int64_t blocks = 0, threads = 0, shared_bytes = 0, every = 1, block = 0;
  bool counts = true;  // the block that runs
  bool rest_runs = false;
  Module module;
  Range dynamic, stack;  // as in races.cpp
  std::vector<Warp> warps;
  Paths paths;
  L1Model l1;
  Tally tally;
  std::vector<std::pair<uint64_t, uint64_t>> added;  // sector and offset, in this block
};

inline Launch launch;

inline std::vector<Range> names;  // of tensors, the last one given first
inline std::string done;          // a line of JSON for each launch
inline int64_t filled = 0;        // bytes, by cudaMemsetAsync
inline thread_local bool kernel_runs = false;
inline int thread = 0;

inline uint32_t in_module(const void* place) { return launch.module.offset_of(place); }

inline Warp& own_warp() { return launch.warps[thread / kWarpLanes]; }
inline uint16_t& own_path() { return own_warp().lanes[thread % kWarpLanes].path; }
inline std::vector<Event>& own_trace() { return own_warp().traces[thread % kWarpLanes]; }

// An access of more than 16 bytes is several.
inline void record(Kind kind, const void* address, size_t bytes, const void* caller, uint16_t path) {
  auto& trace = own_trace();
  for (size_t at = 0; at < bytes; at += kCopyBytes)
    trace.push_back({reinterpret_cast<uintptr_t>(address) + at, in_module(caller), path, kind,
                     static_cast<uint8_t>(std::min(bytes - at, kCopyBytes))});
}

// By a function of the emulator, for its caller.
inline void record_of_caller(Kind kind, const void* address, size_t bytes, const void* caller) {
  if (launch.counts) record(kind, address, bytes, caller, launch.paths.returned(own_path()));
}

inline void on_access(Kind kind, const void* address, size_t bytes, const void* caller) {
  if (!kernel_runs || !launch.counts) return;
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  if (launch.stack.has(at) || launch.module.image.has(at)) return;
  record(kind, address, bytes, caller, own_path());
}

inline bool in_shared(uintptr_t address) {
  return launch.module.declared.has(address) || launch.dynamic.has(address);
}

inline Place place_of(uintptr_t address) {
  for (size_t i = 0; i < names.size(); ++i)
    if (names[names.size() - 1 - i].has(address))
      return {static_cast<int>(names.size() - i), address - names[names.size() - 1 - i].begin};
  return {0, address};
}

// For the model of L1: the lines of a request, each with the requested sectors.
inline void ask_for(const std::vector<uint64_t>& sectors, std::vector<uint64_t>& lines) {
  const size_t first = lines.size();
  for (const uint64_t sector : sectors) {
    const uint64_t line = sector / kSectorsOfLine << kSectorsOfLine, bit = 1ull << sector % kSectorsOfLine;
    const bool same =
        lines.size() > first && (lines.back() & ~Asked::kFirst) >> kSectorsOfLine == line >> kSectorsOfLine;
    if (same) {
      lines.back() |= bit;
    } else {
      lines.push_back(line | bit | (lines.size() == first ? Asked::kFirst : 0));
    }
  }
}

inline void count_reduction(const Request& request, const std::array<Place, kWarpLanes>& places) {
  for (int i = 0; i < request.lanes; ++i) {
    launch.added.push_back({places[i].tensor, places[i].offset});
    const uint64_t end = places[i].at(request.bytes - 1).sector();
    for (uint64_t sector = places[i].sector(); sector <= end; ++sector) ++launch.tally.adds[sector];
  }
  launch.tally.reductions += request.lanes;
}

inline void count_global(const Request& request, uint32_t place, const std::array<Place, kWarpLanes>& places,
                         Warp& warp) {
  Tally& tally = launch.tally;
  const size_t warps = launch.warps.size(), number = &warp - launch.warps.data();
  const uint64_t who = 2 * (launch.block * warps + number) + 1;
  const int tensor = places[0].tensor;
  Global& sum = tally.global[{request.kind, request.bytes, tensor ? names[tensor - 1].name : ""}];
  static std::vector<uint64_t> sectors, lines;
  sectors.clear(), lines.clear();
  for (int i = 0; i < request.lanes; ++i) {
    const uint64_t end = places[i].at(request.bytes - 1).sector();
    for (uint64_t sector = places[i].sector(); sector <= end; ++sector) sectors.push_back(sector);
    sum.digest += (places[i].offset + 1) * 0x9E3779B97F4A7C15ull * who;
  }
  sum.sectors += distinct(sectors);
  for (const uint64_t sector : sectors) lines.push_back(sector / kSectorsOfLine);
  sum.lines += distinct(lines);
  Global& site = tally.sites[{place, false, request.kind, request.bytes}];
  for (Global* one : {&site, &sum}) ++one->requests, one->lanes += request.lanes;
  if (tensor == 0) tally.outside += request.lanes;
  if (request.kind == Kind::kReduction) count_reduction(request, places);
  const bool loads = request.kind == Kind::kLoad || request.kind == Kind::kCopyFrom;
  warp.loads |= loads;
  if (!loads || !launch.l1.resident) return;
  auto& asked = tally.asked[launch.block].warps;
  asked.resize(warps);
  ask_for(sectors, asked[number]);
}

inline void count_step(unsigned lanes, const std::array<const Event*, kWarpLanes>& events, Warp& warp) {
  int back = 0;
  uint32_t place = 0;
  for (int i = 0; i < kWarpLanes; ++i) {
    if (!(lanes >> i & 1u)) continue;
    const Event& event = *events[i];
    auto& last = warp.lanes[i].last;
    if (last.size() <= event.path) last.resize(launch.paths.size());
    back += event.kind == Kind::kStep && event.place <= last[event.path];
    last[event.path] = place = event.place;
  }
  if (back == 0) return;
  Trips& trips = launch.tally.loops[place];
  ++trips.warps, trips.lanes += back;
}

inline void count(unsigned lanes, const std::array<const Event*, kWarpLanes>& events, Warp& warp) {
  const Event& first = *events[__builtin_ctz(lanes)];
  if (first.kind <= Kind::kStep) return count_step(lanes, events, warp);
  Request request{first.kind, first.bytes};
  std::array<Place, kWarpLanes> places{};
  const bool shared = in_shared(first.address);
  for (int i = 0; i < kWarpLanes; ++i) {
    if (!(lanes >> i & 1u)) continue;
    request.at[request.lanes] = events[i]->address;
    if (!shared) places[request.lanes] = place_of(events[i]->address);
    ++request.lanes;
  }
  if (!shared) return count_global(request, first.place, places, warp);
  launch.tally.shared[{request.kind, request.bytes, ""}].add(request);
  Global& site = launch.tally.sites[{first.place, true, request.kind, request.bytes}];
  ++site.requests, site.lanes += request.lanes;
}

inline void replay_warp(Warp& warp) {
  replay(warp.traces, launch.paths, [&](unsigned lanes, const std::array<const Event*, kWarpLanes>& events) {
    count(lanes, events, warp);
  });
}

// A warp waits for its loads, at the latest, where it meets others.
inline void wait(Warp& warp) { warp.waits += std::exchange(warp.loads, false); }

inline void end_block() {
  for (Warp& warp : launch.warps) {
    replay_warp(warp);
    wait(warp);
    launch.tally.waits = std::max(launch.tally.waits, warp.waits);
  }
  launch.warps.clear();
  launch.tally.left += distinct(launch.added);
  launch.added.clear();
}

inline void run_l1_model() {
  for (const bool together : {true, false})
    run_l1(launch.l1, together, launch.tally.asked, [&](uint64_t line, unsigned sectors, int missed) {
      const size_t tensor = line >> 38;  // of a sector's number, by four
      Misses& misses = launch.tally.l1[tensor ? names[tensor - 1].name : ""];
      misses.sectors += together ? __builtin_popcount(sectors) : 0;
      (together ? misses.together : misses.one_by_one) += missed;
    });
}

}  // namespace emulator::counts
