// SPDX-License-Identifier: Apache-2.0
// Launchers of the CUDA kernels of adapter_bottleneck. Asynchronous on params.stream; a launch error throws.
#pragma once

#include "adapter_bottleneck/params.h"

namespace vitkern {

// Writes params.output, and params.kept unless null.
void adapter_bottleneck_forward_cuda(const AdapterBottleneckParams& params);

// Bytes of backward's workspace, from sizes and dtype only. Below half of x's size if x has more than a few times as
// many rows as there are hidden units.
int64_t adapter_bottleneck_workspace_cuda(const AdapterBottleneckParams& params);

// Writes the gradients that are not null; bitwise reproducible.
void adapter_bottleneck_backward_cuda(const AdapterBottleneckParams& params);

}  // namespace vitkern
