// SPDX-License-Identifier: Apache-2.0
// Launchers of the CUDA kernels of token_pool. Asynchronous on params.stream; a launch error throws.
#pragma once

#include "token_pool/params.h"

namespace vitkern {

// Bytes of the workspace of either pass, from sizes and dtype only: at most a quarter of x, or one part of the sums for
// each image.
int64_t token_pool_forward_workspace_cuda(const TokenPoolParams& params);
int64_t token_pool_backward_workspace_cuda(const TokenPoolParams& params);

// Writes params.output and params.statistics.
void token_pool_forward_cuda(const TokenPoolParams& params);

// Writes the gradients that are not null; bitwise reproducible.
void token_pool_backward_cuda(const TokenPoolParams& params);

}  // namespace vitkern
