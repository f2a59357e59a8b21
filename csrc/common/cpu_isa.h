// SPDX-License-Identifier: Apache-2.0
// The instruction sets that the CPU kernels are compiled for, and the choice among them.
//
// An op's cpu.cpp is compiled once per set, each time with VITKERN_ISA naming the namespace its code lives
// in. CMake decides which sets a build has (VITKERN_HAVE_<SET>); the chip and the user decide which one runs.
#pragma once

#include <string>
#include <vector>

namespace vitkern {

// From slowest to fastest. `baseline` is what every chip of the architecture has: SSE2 on x86-64, NEON on
// AArch64.
enum class CpuIsa { kBaseline, kAvx2, kAvx512 };

std::vector<std::string> compiled_cpu_isas();
std::vector<std::string> supported_cpu_isas();  // those of them that this chip runs

// The set that the next call uses. Choosing one that is not supported throws std::invalid_argument.
CpuIsa cpu_isa();
std::string cpu_isa_name();
void set_cpu_isa(const std::string& name);

// Calls a function of the chosen set: VITKERN_DISPATCH_ISA(ms_deform_attn_forward(params)).
#if defined(VITKERN_HAVE_AVX512)
#define VITKERN_CASE_AVX512(CALL) \
  case CpuIsa::kAvx512:           \
    return isa_avx512::CALL;
#else
#define VITKERN_CASE_AVX512(CALL)
#endif
#if defined(VITKERN_HAVE_AVX2)
#define VITKERN_CASE_AVX2(CALL) \
  case CpuIsa::kAvx2:           \
    return isa_avx2::CALL;
#else
#define VITKERN_CASE_AVX2(CALL)
#endif
#define VITKERN_DISPATCH_ISA(CALL) \
  switch (cpu_isa()) {             \
    VITKERN_CASE_AVX512(CALL)      \
    VITKERN_CASE_AVX2(CALL)        \
    default:                       \
      return isa_baseline::CALL;   \
  }

}  // namespace vitkern
