// SPDX-License-Identifier: Apache-2.0
// Launchers of the CUDA kernels of adapter_bottleneck. Asynchronous on params.stream; a launch error throws.
#pragma once

#include "adapter_bottleneck/params.h"

namespace vitkern {

void adapter_bottleneck_forward_cuda(const AdapterBottleneckParams& params);
void adapter_bottleneck_backward_cuda(const AdapterBottleneckParams& params, void* workspace);

// Bytes of the workspace, which depend on sizes and dtype alone.
int64_t adapter_bottleneck_workspace_cuda(const AdapterBottleneckParams& params);

}  // namespace vitkern
