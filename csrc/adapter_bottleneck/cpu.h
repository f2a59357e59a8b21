// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of adapter_bottleneck, one pair for each instruction set (common/cpu_isa.h).
#pragma once

#include "adapter_bottleneck/params.h"

namespace vitkern {

#define VITKERN_DECLARE(NAMESPACE)                                         \
  namespace NAMESPACE {                                                    \
  void adapter_bottleneck_forward(const AdapterBottleneckParams& params);  \
  void adapter_bottleneck_backward(const AdapterBottleneckParams& params); \
  }
VITKERN_DECLARE(isa_baseline)
VITKERN_DECLARE(isa_avx2)
VITKERN_DECLARE(isa_avx512)
#undef VITKERN_DECLARE

}  // namespace vitkern
