// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of token_project, one pair for each instruction set (common/cpu_isa.h).
#pragma once

#include "token_project/params.h"

namespace vitkern {

#define VITKERN_DECLARE(NAMESPACE)                               \
  namespace NAMESPACE {                                          \
  void token_project_forward(const TokenProjectParams& params);  \
  void token_project_backward(const TokenProjectParams& params); \
  }
VITKERN_DECLARE(isa_baseline)
VITKERN_DECLARE(isa_avx2)
VITKERN_DECLARE(isa_avx512)
#undef VITKERN_DECLARE

}  // namespace vitkern
