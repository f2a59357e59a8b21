// SPDX-License-Identifier: Apache-2.0
// The adapter bottleneck: parameters of all native kernels, CPU and CUDA, forward and backward.
//
// Shapes: N rows (all leading dimensions of x together), C channels, H hidden units. Everything is contiguous.
// The maths is in docs/derivations/adapter_bottleneck.md.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/target.h"

namespace vitkern {

// Gelu is the exact one, with erf.
enum class Activation : int32_t { kRelu = 0, kGelu = 1, kSilu = 2 };

// The dropout mask depends only on the seed and on a hidden unit's index, eq. (4).
struct Dropout {
  const int64_t* seed;  // [1], on the device; null: no dropout
  uint32_t threshold;   // a unit is dropped if its 32 random bits are below
  double rescale;       // the factor of the other units
};

struct AdapterBottleneckParams : Target {
  int64_t rows;      // N
  int64_t channels;  // C
  int64_t hidden;    // H

  Activation activation;
  DType dtype;         // of x, weights, biases, residual, output, grad_output and grad_x
  bool residual_is_x;  // the residual is x, and grad_x includes its gradient; `residual` is null
  double factor;       // s of eq. (3) is factor * *scale
  Dropout dropout;

  // Inputs. Optional ones may be null.
  const void* x;            // [N, C]
  const void* down_weight;  // [H, C]
  const void* down_bias;    // [H], optional
  const void* up_weight;    // [C, H]
  const void* up_bias;      // [C], optional
  const void* residual;     // [N, C], optional
  const void* scale;        // [1], accumulator type, on the device, optional
  const void* grad_output;  // [N, C], backward only

  // z of eq. (1) in the accumulator type, with or without bias, as the backend defines. Forward writes it unless
  // null; backward reads it, or computes it again if null.
  void* kept;  // [N, H]

  // Outputs, all fully written. Gradients that are not needed are null. Gradients of parameters have the
  // accumulator type; the gradient of the residual is grad_output itself.
  void* output;            // [N, C], forward only
  void* grad_x;            // [N, C]
  void* grad_down_weight;  // [H, C]
  void* grad_down_bias;    // [H]
  void* grad_up_weight;    // [C, H]
  void* grad_up_bias;      // [C]
  void* grad_scale;        // [1], of *scale: includes factor
};

}  // namespace vitkern
