// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of ms_deform_attn, each a table by instruction set (common/cpu_isa.h).
#pragma once

#include "common/cpu_isa.h"
#include "ms_deform_attn/params.h"

namespace vitkern {

inline bool avx512_has(const MsDeformAttnParams& p) {
  return p.value_dtype != DType::kFloat64 && p.sampling == Sampling::kBilinear;
}

VITKERN_CPU_KERNEL(ms_deform_attn_forward, MsDeformAttnParams);
VITKERN_CPU_KERNEL(ms_deform_attn_backward, MsDeformAttnParams);

}  // namespace vitkern
