// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of adapter_bottleneck, each a table by instruction set (common/cpu_isa.h).
#pragma once

#include "adapter_bottleneck/params.h"
#include "common/cpu_isa.h"

namespace vitkern {

inline bool avx512_has(const AdapterBottleneckParams& p) { return p.dtype != DType::kFloat64; }

VITKERN_CPU_KERNEL(adapter_bottleneck_forward, AdapterBottleneckParams);
VITKERN_CPU_KERNEL(adapter_bottleneck_backward, AdapterBottleneckParams);

}  // namespace vitkern
