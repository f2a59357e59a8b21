// SPDX-License-Identifier: Apache-2.0
// Placeholder until the kernels are written.
#include "adapter_bottleneck/cuda.h"

#include <stdexcept>

namespace vitkern {

void adapter_bottleneck_forward_cuda(const AdapterBottleneckParams&) {
  throw std::logic_error("not written yet");
}
void adapter_bottleneck_backward_cuda(const AdapterBottleneckParams&, void*) {
  throw std::logic_error("not written yet");
}
int64_t adapter_bottleneck_workspace_cuda(const AdapterBottleneckParams&) {
  throw std::logic_error("not written yet");
}

}  // namespace vitkern
