// SPDX-License-Identifier: Apache-2.0
// Calls the CPU kernel that was compiled for an element type, given by its number.
#pragma once

#include <stdexcept>

#include "common/elements.h"

namespace vitkern::VITKERN_ISA {
namespace {

#if defined(__AVX512F__)
constexpr bool kIsAvx512 = true;  // which has no doubles: see CpuKernel in cpu_isa.h
#else
constexpr bool kIsAvx512 = false;
#endif

// Calls run(T{}) with the element type.
template <typename Run>
void dispatch_dtype(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::kFloat32:
      return run(float{});
    case DType::kFloat64:
      if constexpr (!kIsAvx512) return run(double{});
      break;
    case DType::kFloat16:
      return run(Half{});
    case DType::kBFloat16:
      return run(BFloat16{});
  }
  throw std::invalid_argument("unknown dtype code");
}

}  // namespace
}  // namespace vitkern::VITKERN_ISA
