// SPDX-License-Identifier: Apache-2.0
// The entry points: handle empty tensors, then call the kernel for the element type.
#include "token_pool/cpu.h"

#include "token_pool/cpu_backward.h"
#include "token_pool/cpu_forward.h"

namespace vitkern::VITKERN_ISA {
namespace {

// An image without pixels has tokens of zeros.
template <typename T>
void clear_tokens(const TokenPoolParams& p) {
  using Acc = Accumulator<T>;
  memset(p.output, 0, p.batch * p.tokens * p.channels * sizeof(T));
  memset(p.statistics, 0, p.batch * 2 * p.tokens * sizeof(Acc));  // zeros: without pixels they are not read
}

}  // namespace

void token_pool_forward(const TokenPoolParams& p) {
  if (p.batch * p.tokens == 0) return;
  if (p.pixels == 0)
    return dispatch_dtype(p.dtype, [&](auto element) { clear_tokens<decltype(element)>(p); });
  dispatch_dtype(p.dtype, [&](auto element) { forward<decltype(element)>(p); });
}

void token_pool_backward(const TokenPoolParams& p) {
  if (!(p.grad_x || p.grad_weight)) return;
  dispatch_dtype(p.dtype, [&](auto element) { backward<decltype(element)>(p); });
}

}  // namespace vitkern::VITKERN_ISA
