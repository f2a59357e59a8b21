// SPDX-License-Identifier: Apache-2.0
// From numbers that are known at run time to kernels that were compiled for them.
#pragma once

#include <stdexcept>

#include "common/dtype.h"
#include "common/vec.cuh"

namespace vitkern {

template <typename T>
struct Type {
  using type = T;
};

template <typename Call>
void dispatch_dtype(DType dtype, const Call& call) {
  switch (dtype) {
    case DType::kFloat32:
      return call(Type<float>{});
    case DType::kFloat64:
      return call(Type<double>{});
    case DType::kFloat16:
      return call(Type<__half>{});
    case DType::kBFloat16:
      return call(Type<__nv_bfloat16>{});
  }
  throw std::invalid_argument("vitkern: unknown dtype");
}

}  // namespace vitkern
