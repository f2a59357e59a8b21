// SPDX-License-Identifier: Apache-2.0
// The element types that cross the boundary between Python and the kernels, by number.
#pragma once

#include <cstdint>

namespace vitkern {

enum class DType : int32_t { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

// The type that sums are made in.
constexpr DType accumulator(DType dtype) { return dtype == DType::kFloat64 ? dtype : DType::kFloat32; }

// The size of an element.
constexpr int64_t bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

}  // namespace vitkern
