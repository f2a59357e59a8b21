// SPDX-License-Identifier: Apache-2.0
// The element types that cross the boundary between Python and the kernels, by number.
#pragma once

#include <cstdint>

namespace vitkern {

enum class DType : int32_t { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

}  // namespace vitkern
