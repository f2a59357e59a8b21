// SPDX-License-Identifier: Apache-2.0
// Multi-scale deformable attention: parameters of all native kernels, CPU and CUDA, forward and backward.
//
// Shapes: B images, S pixels of all levels together, M heads, D channels of a head, Q queries, L levels,
// K sampling points of a query and head over all levels. Everything is contiguous.
// The maths is in docs/derivations/ms_deform_attn.md.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/target.h"

namespace vitkern {

enum class Sampling : int32_t { kBilinear = 0, kNearest = 1 };

// Levels of unequal point counts are described by value, so that no launch has to copy a table to the device.
constexpr int kMaxRaggedLevels = 256;

// The fused form: `locations` hold offsets, `weights` hold logits, and the kernels compute softmax and locations as they
// read these, eqs. (8) to (10). Strides count numbers and are 0 along an axis that is broadcast.
struct Reference {
  const void* points;    // [B | 1, Q, L | 1, numbers], accumulator type; null: the plain form
  int64_t numbers;       // 2: (x, y), 4: (x, y, width, height)
  int64_t batch_stride;  // from image to image
  int64_t query_stride;
  int64_t level_stride;
};

struct MsDeformAttnParams : Target {
  // Sizes.
  int64_t batch;     // B
  int64_t pixels;    // S
  int64_t heads;     // M
  int64_t channels;  // D
  int64_t queries;   // Q
  int64_t levels;    // L
  int64_t points;    // K

  // Points of each level: K / L where `ragged` is 0, else level l owns points [point_end[l - 1], point_end[l]).
  int32_t ragged;
  uint16_t point_end[kMaxRaggedLevels];

  bool checks_levels;  // whether those in the host's memory are checked: tests of kernels alone leave it out
  Sampling sampling;
  DType value_dtype;  // of value, output, grad_output
  DType coord_dtype;  // of locations, weights and their gradients: value_dtype or its accumulator

  // Inputs.
  const void* value;              // [B, S, M, D]
  const int64_t* spatial_shapes;  // [L, 2] as (height, width)
  const int64_t* level_start;     // [L] first pixel of each level
  const void* locations;          // [B, Q, M, K, 2] as (x, y), 1 = the level's full width and height
  const void* weights;            // [B, Q, M, K]
  Reference reference;            // fused form only
  const void* grad_output;        // [B, Q, M, D], backward only

  // Outputs, all fully written unless said otherwise. A gradient that is not needed is a null pointer.
  void* output;          // [B, Q, M, D], forward only
  void* grad_value;      // [B, S, M, D]: cpu: value_dtype; cuda: accumulator type, zero-filled by the caller
  void* grad_locations;  // [B, Q, M, K, 2]
  void* grad_weights;    // [B, Q, M, K]; cuda, fused form: accumulator type
  void* grad_computed;   // [B, Q, M, K, 2], accumulator type, fused form only: gradient of the
                         // computed locations, which the caller sums to that of the reference points

  // cuda, deterministic: see cuda.h.
  int64_t* cells;        // [B, Q, M, K]
  const int64_t* order;  // [B * Q * M * K]
  const int64_t* first;  // [B * M * S + 1]
  void* softmax;         // [B, Q, M, 2], accumulator type, fused form only
};

}  // namespace vitkern
