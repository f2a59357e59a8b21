// SPDX-License-Identifier: Apache-2.0
// The entry points: call the kernel for the element type.
#include "adapter_bottleneck/cpu.h"

#include "adapter_bottleneck/cpu_backward.h"
#include "common/dispatch.h"

namespace vitkern::VITKERN_ISA {
void adapter_bottleneck_forward(const AdapterBottleneckParams& p) {
  if (p.rows == 0) return;
  dispatch_dtype(p.dtype, [&](auto element) { forward<decltype(element)>(p); });
}

void adapter_bottleneck_backward(const AdapterBottleneckParams& p) {
  dispatch_dtype(p.dtype, [&](auto element) { backward<decltype(element)>(p); });
}

}  // namespace vitkern::VITKERN_ISA
