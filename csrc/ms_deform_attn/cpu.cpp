// SPDX-License-Identifier: Apache-2.0
#include "ms_deform_attn/cpu.h"

#include <stdexcept>

namespace vitkern::VITKERN_ISA {
void ms_deform_attn_forward(const MsDeformAttnParams&) { throw std::runtime_error("not written yet"); }
void ms_deform_attn_backward(const MsDeformAttnParams&) { throw std::runtime_error("not written yet"); }
}  // namespace vitkern::VITKERN_ISA
