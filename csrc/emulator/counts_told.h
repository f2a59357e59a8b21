// SPDX-License-Identifier: Apache-2.0
// The counts of a launch as a line of JSON.
#pragma once

#include <sstream>

#include "emulator/counting.h"

namespace emulator::counts {

template <typename Map, typename Tell>
void tell(std::ostream& out, const char* name, const Map& map, const Tell& tell_one) {
  out << ", \"" << name << "\": [";
  const char* before = "";
  for (const auto& [key, value] : map) {
    out << before;
    before = ", ";
    tell_one(key, value);
  }
  out << "]";
}

inline std::string told(const Launch& launch) {
  const Tally& tally = launch.tally;
  int64_t most = 0;
  for (const auto& [sector, adds] : tally.adds) most = std::max(most, adds);
  std::ostringstream out;
  out << "{\"kernel\": \"" << launch.kernel << "\", \"blocks\": " << launch.blocks
      << ", \"counted\": " << tally.counted << ", \"threads\": " << launch.threads
      << ", \"shared_bytes\": " << launch.shared_bytes << ", \"waits\": " << tally.waits
      << ", \"barriers\": " << tally.barriers << ", \"outside\": " << tally.outside
      << ", \"reductions\": {\"adds\": " << tally.reductions << ", \"left\": " << tally.left
      << ", \"sectors\": " << tally.adds.size() << ", \"most\": " << most << "}";
  const auto access = [&](const Key& key) {
    const auto& [kind, bytes, tensor] = key;
    out << "{\"what\": \"" << name_of(kind) << "\", \"bytes\": " << bytes << ", \"tensor\": \"" << tensor
        << "\", ";
  };
  tell(out, "global", tally.global, [&](const Key& key, const Global& sum) {
    access(key);
    out << "\"requests\": " << sum.requests << ", \"lanes\": " << sum.lanes
        << ", \"sectors\": " << sum.sectors << ", \"lines\": " << sum.lines << ", \"digest\": " << sum.digest
        << "}";
  });
  tell(out, "shared", tally.shared, [&](const Key& key, const Shared& sum) {
    access(key);
    out << "\"requests\": " << sum.requests << ", \"lanes\": " << sum.lanes << ", \"least\": " << sum.least
        << ", \"most\": " << sum.most << "}";
  });
  tell(out, "sites", tally.sites, [&](const Site& site, const Global& sum) {
    const auto& [place, shared, kind, bytes] = site;
    out << "{\"place\": " << place << ", \"shared\": " << (shared ? "true" : "false") << ", \"what\": \""
        << name_of(kind) << "\", \"bytes\": " << bytes << ", \"requests\": " << sum.requests
        << ", \"lanes\": " << sum.lanes << "}";
  });
  tell(out, "loops", tally.loops, [&](uint32_t place, const Trips& trips) {
    out << "{\"place\": " << place << ", \"trips\": " << trips.warps << ", \"lanes\": " << trips.lanes << "}";
  });
  tell(out, "l1", tally.l1, [&](const std::string& tensor, const Misses& misses) {
    out << "{\"tensor\": \"" << tensor << "\", \"sectors\": " << misses.sectors
        << ", \"together\": " << misses.together << ", \"one by one\": " << misses.one_by_one << "}";
  });
  out << "}\n";
  return out.str();
}

}  // namespace emulator::counts
