// SPDX-License-Identifier: Apache-2.0
// Placeholder until the kernels are written.
#include "token_pool/cuda.h"

#include <stdexcept>

namespace vitkern {

void token_pool_forward_cuda(const TokenPoolParams&, void*) { throw std::logic_error("not written yet"); }
void token_pool_backward_cuda(const TokenPoolParams&, void*) { throw std::logic_error("not written yet"); }
int64_t token_pool_workspace_cuda(const TokenPoolParams&, bool) { throw std::logic_error("not written yet"); }

}  // namespace vitkern
