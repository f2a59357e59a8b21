// SPDX-License-Identifier: Apache-2.0
#include "common/cpu_isa.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(_MSC_VER) && defined(_M_X64)
#include <immintrin.h>
#include <intrin.h>
#elif defined(__x86_64__)
#include <cpuid.h>
#endif

namespace vitkern {
namespace {

struct IsaEntry {
  CpuIsa isa;
  const char* name;
  bool supported;
};

#if defined(_MSC_VER) && defined(_M_X64)
// The operating system must save the wider registers too: bits of XCR0.
bool os_saves(unsigned long long mask) {
  int regs[4];
  __cpuid(regs, 1);
  const bool has_xgetbv = regs[2] & (1 << 27);
  return has_xgetbv && (_xgetbv(0) & mask) == mask;
}

bool has_avx2() {
  int leaf1[4], leaf7[4];
  __cpuid(leaf1, 1);
  __cpuidex(leaf7, 7, 0);
  const bool fma_f16c = (leaf1[2] & (1 << 12)) && (leaf1[2] & (1 << 29));
  return fma_f16c && (leaf7[1] & (1 << 5)) && os_saves(0x6);
}

bool has_avx512() {
  int leaf7[4];
  __cpuidex(leaf7, 7, 0);
  const unsigned f_dq_bw_vl = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);
  return has_avx2() && (static_cast<unsigned>(leaf7[1]) & f_dq_bw_vl) == f_dq_bw_vl && os_saves(0xe6);
}
#elif defined(__x86_64__)
// __builtin_cpu_supports() knows f16c only from GCC 11 and Clang 18 on.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
#endif

const std::vector<IsaEntry>& entries() {
  static const std::vector<IsaEntry> all = {
      {CpuIsa::kBaseline, "baseline", true},
#if defined(VITKERN_HAVE_AVX2)
      {CpuIsa::kAvx2, "avx2", has_avx2()},
#endif
#if defined(VITKERN_HAVE_AVX512)
      {CpuIsa::kAvx512, "avx512", has_avx512()},
#endif
  };
  return all;
}

// The entry of that name, or an error that lists what could have been said.
const IsaEntry& usable(const std::string& name) {
  std::string known;
  for (const IsaEntry& entry : entries()) {
    if (name == entry.name && entry.supported) return entry;
    known +=
        std::string(known.empty() ? "" : ", ") + entry.name + (entry.supported ? "" : " (not on this chip)");
  }
  throw std::invalid_argument("cpu instruction set '" + name + "' cannot be used; this build has: " + known);
}

// Made by the first call, which throws if VITKERN_CPU_ISA cannot be obeyed; so then does the next.
std::atomic<CpuIsa>& chosen() {
  static std::atomic<CpuIsa> isa = [] {
    const char* wanted = std::getenv("VITKERN_CPU_ISA");
    try {
      if (wanted != nullptr && *wanted != '\0') return usable(wanted).isa;
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument(std::string("VITKERN_CPU_ISA: ") + error.what());
    }
    CpuIsa fastest = CpuIsa::kBaseline;
    for (const IsaEntry& entry : entries())
      if (entry.supported) fastest = entry.isa;
    return fastest;
  }();
  return isa;
}

}  // namespace

std::vector<std::string> compiled_cpu_isas() {
  std::vector<std::string> names;
  for (const IsaEntry& entry : entries()) names.push_back(entry.name);
  return names;
}

std::vector<std::string> supported_cpu_isas() {
  std::vector<std::string> names;
  for (const IsaEntry& entry : entries())
    if (entry.supported) names.push_back(entry.name);
  return names;
}

CpuIsa cpu_isa() { return chosen().load(std::memory_order_relaxed); }

std::string cpu_isa_name() {
  for (const IsaEntry& entry : entries())
    if (entry.isa == cpu_isa()) return entry.name;
  return "baseline";
}

void set_cpu_isa(const std::string& name) { chosen().store(usable(name).isa); }

}  // namespace vitkern
