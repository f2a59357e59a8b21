// SPDX-License-Identifier: Apache-2.0
// The instruction sets that the CPU kernels are compiled for, and the choice among them.
//
// An op's cpu.cpp is compiled once per set, each time with VITKERN_ISA naming the namespace its code lives
// in. CMake decides which sets a build has (VITKERN_HAVE_<SET>); the chip and the user decide which one runs.
#pragma once

#include <string>
#include <vector>

namespace vitkern {

// From slowest to fastest. Every chip of the architecture has `baseline`: SSE2 on x86-64, NEON on AArch64.
enum class CpuIsa { kBaseline, kAvx2, kAvx512 };

std::vector<std::string> compiled_cpu_isas();
std::vector<std::string> supported_cpu_isas();  // the subset that this chip runs

// The set that the next call uses. Choosing one that is not supported throws std::invalid_argument.
CpuIsa cpu_isa();
std::string cpu_isa_name();
void set_cpu_isa(const std::string& name);

// A kernel of each set, by CpuIsa; null where a build has none.
template <typename Params>
struct CpuKernel {
  void (*of_isa[3])(const Params&);

  explicit operator bool() const { return of_isa[0] != nullptr; }
#ifndef VITKERN_EMULATED  // which has no CPU kernels
  // AVX-512 leaves what is seldom in a hurry to AVX2, which makes the build faster: see avx512_has() of each op.
  void operator()(const Params& params) const {
    const CpuIsa isa = cpu_isa();
    of_isa[static_cast<int>(isa == CpuIsa::kAvx512 && !avx512_has(params) ? CpuIsa::kAvx2 : isa)](params);
  }
#endif
};

// clang-format off
#if defined(VITKERN_EMULATED)
#define VITKERN_IF_CPU(FUNCTION) nullptr
#else
#define VITKERN_IF_CPU(FUNCTION) FUNCTION
#endif
#if defined(VITKERN_HAVE_AVX2)
#define VITKERN_IF_AVX2(FUNCTION) FUNCTION
#else
#define VITKERN_IF_AVX2(FUNCTION) nullptr
#endif
#if defined(VITKERN_HAVE_AVX512)
#define VITKERN_IF_AVX512(FUNCTION) FUNCTION
#else
#define VITKERN_IF_AVX512(FUNCTION) nullptr
#endif
// clang-format on

// Declares an op's kernel in the namespace of each set, and the table of them under the same name.
#define VITKERN_CPU_KERNEL(NAME, PARAMS)                                         \
  namespace isa_baseline {                                                       \
  void NAME(const PARAMS& params);                                               \
  }                                                                              \
  namespace isa_avx2 {                                                           \
  void NAME(const PARAMS& params);                                               \
  }                                                                              \
  namespace isa_avx512 {                                                         \
  void NAME(const PARAMS& params);                                               \
  }                                                                              \
  constexpr CpuKernel<PARAMS> NAME##_cpu = {{VITKERN_IF_CPU(isa_baseline::NAME), \
                                             VITKERN_IF_AVX2(isa_avx2::NAME),    \
                                             VITKERN_IF_AVX512(isa_avx512::NAME)}}

}  // namespace vitkern
