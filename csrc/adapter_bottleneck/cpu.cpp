// SPDX-License-Identifier: Apache-2.0
// Placeholder until the kernels are written.
#include "adapter_bottleneck/cpu.h"

#include <stdexcept>

namespace vitkern::VITKERN_ISA {

void adapter_bottleneck_forward(const AdapterBottleneckParams&) { throw std::logic_error("not written yet"); }
void adapter_bottleneck_backward(const AdapterBottleneckParams&) {
  throw std::logic_error("not written yet");
}

}  // namespace vitkern::VITKERN_ISA
