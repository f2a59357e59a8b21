// SPDX-License-Identifier: Apache-2.0
// Placeholder until the kernels are written.
#include "token_project/cuda.h"

#include <stdexcept>

namespace vitkern {

void token_project_forward_cuda(const TokenProjectParams&) { throw std::logic_error("not written yet"); }
void token_project_backward_cuda(const TokenProjectParams&, void*) {
  throw std::logic_error("not written yet");
}
int64_t token_project_workspace_cuda(const TokenProjectParams&) { throw std::logic_error("not written yet"); }

}  // namespace vitkern
