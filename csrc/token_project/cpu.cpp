// SPDX-License-Identifier: Apache-2.0
// The entry points: call the kernel for the element type.
#include "token_project/cpu.h"

#include "token_project/cpu_backward.h"
#include "token_project/cpu_forward.h"

namespace vitkern::VITKERN_ISA {

void token_project_forward(const TokenProjectParams& p) {
  dispatch_dtype(p.dtype, [&](auto element) { forward<decltype(element)>(p); });
}

void token_project_backward(const TokenProjectParams& p) {
  if (!(p.grad_query || p.grad_key || p.grad_tokens)) return;
  dispatch_dtype(p.dtype, [&](auto element) { backward<decltype(element)>(p); });
}

}  // namespace vitkern::VITKERN_ISA
