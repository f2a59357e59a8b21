// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of token_pool, each a table by instruction set (common/cpu_isa.h).
#pragma once

#include "common/cpu_isa.h"
#include "token_pool/params.h"

namespace vitkern {

inline bool avx512_has(const TokenPoolParams& p) { return p.dtype != DType::kFloat64; }

VITKERN_CPU_KERNEL(token_pool_forward, TokenPoolParams);
VITKERN_CPU_KERNEL(token_pool_backward, TokenPoolParams);

}  // namespace vitkern
