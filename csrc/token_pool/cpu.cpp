// SPDX-License-Identifier: Apache-2.0
// Placeholder until the kernels are written.
#include "token_pool/cpu.h"

#include <stdexcept>

namespace vitkern::VITKERN_ISA {

void token_pool_forward(const TokenPoolParams&) { throw std::logic_error("not written yet"); }
void token_pool_backward(const TokenPoolParams&) { throw std::logic_error("not written yet"); }

}  // namespace vitkern::VITKERN_ISA
