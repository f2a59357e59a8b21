// SPDX-License-Identifier: Apache-2.0
// Launchers of the CUDA kernels of token_project. Asynchronous on params.stream; a launch error throws.
#pragma once

#include "token_project/params.h"

namespace vitkern {

void token_project_forward_cuda(const TokenProjectParams& params);
void token_project_backward_cuda(const TokenProjectParams& params, void* workspace);

// Bytes of the workspace, which depend on sizes and dtype alone.
int64_t token_project_workspace_cuda(const TokenProjectParams& params);

}  // namespace vitkern
