// SPDX-License-Identifier: Apache-2.0
// Projection of tokens back to pixels: parameters of all native kernels, CPU and CUDA, forward and backward.
//
// Shapes: B images, N pixels, C channels, T tokens, K channels of a query or key. Everything is contiguous.
// The maths is in docs/derivations/token_project.md.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/target.h"

namespace vitkern {

struct TokenProjectParams : Target {
  int64_t batch;        // B
  int64_t pixels;       // N
  int64_t channels;     // C
  int64_t token_count;  // T
  int64_t keys;         // K

  DType dtype;  // of all tensors except grad_key and grad_tokens

  // Inputs.
  const void* x;            // [B, N, C], forward only
  const void* query;        // [B, N, K]
  const void* key;          // [B, T, K]
  const void* tokens;       // [B, T, C]
  const void* grad_output;  // [B, N, C], backward only; it is the gradient of x too

  // Outputs, all fully written. Gradients that are not needed are null.
  void* output;       // [B, N, C], forward only
  void* grad_query;   // [B, N, K]
  void* grad_key;     // [B, T, K], accumulator type
  void* grad_tokens;  // [B, T, C], accumulator type
};

}  // namespace vitkern
