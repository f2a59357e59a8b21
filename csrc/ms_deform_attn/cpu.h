// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of ms_deform_attn, one pair for each instruction set (common/cpu_isa.h).
#pragma once

#include "ms_deform_attn/params.h"

namespace vitkern {

#define VITKERN_DECLARE(NAMESPACE)                                \
  namespace NAMESPACE {                                           \
  void ms_deform_attn_forward(const MsDeformAttnParams& params);  \
  void ms_deform_attn_backward(const MsDeformAttnParams& params); \
  }
VITKERN_DECLARE(isa_baseline)
VITKERN_DECLARE(isa_avx2)
VITKERN_DECLARE(isa_avx512)
#undef VITKERN_DECLARE

}  // namespace vitkern
