// SPDX-License-Identifier: Apache-2.0
// Launchers of the CUDA kernels of token_project. Asynchronous on params.stream; a launch error throws.
#pragma once

#include "token_project/params.h"

namespace vitkern {

// Writes params.output.
void token_project_forward_cuda(const TokenProjectParams& params);

// Bytes of backward's workspace, from sizes and dtype only.
int64_t token_project_workspace_cuda(const TokenProjectParams& params);

// Writes the gradients that are not null; bitwise reproducible.
void token_project_backward_cuda(const TokenProjectParams& params);

}  // namespace vitkern
