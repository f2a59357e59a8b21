// SPDX-License-Identifier: Apache-2.0
// Softmax pooling of pixels into tokens: parameters of all native kernels, CPU and CUDA, forward and backward.
//
// Shapes: B images, N pixels, C channels, T tokens. Everything is contiguous.
// The maths is in docs/derivations/token_pool.md.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/target.h"

namespace vitkern {

struct TokenPoolParams : Target {
  int64_t batch;     // B
  int64_t pixels;    // N
  int64_t channels;  // C
  int64_t tokens;    // T

  bool weight_per_image;  // weight is [B, T, C], else [T, C] for all images
  DType dtype;            // of x, weight, tokens and their gradients, except grad_weight

  // Inputs.
  const void* x;            // [B, N, C]
  const void* weight;       // [T, C] or [B, T, C]
  const void* grad_output;  // [B, T, C], backward only
  const void* pooled;       // [B, T, C], forward's output, backward only

  // Outputs, all fully written. Gradients that are not needed are null.
  void* output;  // [B, T, C], forward only
  void*
      statistics;  // [B, 2, T], accumulator type: m, then l of eq. (4). Forward writes it, backward reads it.
  void* grad_x;    // [B, N, C]
  void* grad_weight;  // like weight, accumulator type
};

}  // namespace vitkern
