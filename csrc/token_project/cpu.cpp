// SPDX-License-Identifier: Apache-2.0
// Placeholder until the kernels are written.
#include "token_project/cpu.h"

#include <stdexcept>

namespace vitkern::VITKERN_ISA {

void token_project_forward(const TokenProjectParams&) { throw std::logic_error("not written yet"); }
void token_project_backward(const TokenProjectParams&) { throw std::logic_error("not written yet"); }

}  // namespace vitkern::VITKERN_ISA
