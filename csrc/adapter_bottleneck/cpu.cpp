// SPDX-License-Identifier: Apache-2.0
// The entry points: pick the kernel for the element type.
#include "adapter_bottleneck/cpu.h"

#include <stdexcept>

#include "adapter_bottleneck/cpu_backward.h"

namespace vitkern::VITKERN_ISA {
namespace {

template <typename Run>
void dispatch_dtype(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::kFloat32:
      return run(float{});
    case DType::kFloat64:
      return run(double{});
    case DType::kFloat16:
      return run(Half{});
    case DType::kBFloat16:
      return run(BFloat16{});
  }
  throw std::invalid_argument("adapter_bottleneck: unknown dtype code");
}

}  // namespace

void adapter_bottleneck_forward(const AdapterBottleneckParams& p) {
  if (p.rows == 0) return;
  dispatch_dtype(p.dtype, [&](auto element) { forward<decltype(element)>(p); });
}

void adapter_bottleneck_backward(const AdapterBottleneckParams& p) {
  dispatch_dtype(p.dtype, [&](auto element) { backward<decltype(element)>(p); });
}

}  // namespace vitkern::VITKERN_ISA
