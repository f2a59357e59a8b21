// SPDX-License-Identifier: Apache-2.0
// Launchers of the CUDA kernels of token_pool. Asynchronous on params.stream; a launch error throws.
#pragma once

#include "token_pool/params.h"

namespace vitkern {

void token_pool_forward_cuda(const TokenPoolParams& params, void* workspace);
void token_pool_backward_cuda(const TokenPoolParams& params, void* workspace);

// Bytes of the workspace, which depend on sizes and dtype alone.
int64_t token_pool_workspace_cuda(const TokenPoolParams& params, bool backward);

}  // namespace vitkern
