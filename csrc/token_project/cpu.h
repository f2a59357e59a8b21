// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of token_project, each a table by instruction set (common/cpu_isa.h).
#pragma once

#include "common/cpu_isa.h"
#include "token_project/params.h"

namespace vitkern {

inline bool avx512_has(const TokenProjectParams& p) { return p.dtype != DType::kFloat64; }

VITKERN_CPU_KERNEL(token_project_forward, TokenProjectParams);
VITKERN_CPU_KERNEL(token_project_backward, TokenProjectParams);

}  // namespace vitkern
