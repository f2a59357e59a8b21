// SPDX-License-Identifier: Apache-2.0
// Launchers of the CUDA kernels of ms_deform_attn. Asynchronous on params.stream; a launch error throws.
#pragma once

#include "ms_deform_attn/params.h"

namespace vitkern {

// Writes params.output.
void ms_deform_attn_forward_cuda(const MsDeformAttnParams& params);

// Writes grad_locations and grad_weights, and adds into grad_value with atomics: its last bits depend on
// scheduling. In the fused form grad_weights is of accumulator type, whatever the logits are.
void ms_deform_attn_backward_cuda(const MsDeformAttnParams& params);

// The bitwise reproducible way to grad_value, in two steps with a stable sort by the caller between them
// (docs/derivations/ms_deform_attn.md, "Deterministic"). The first files each sampling point under the last
// pixel, in memory order, that it touches: cells[B, Q, M, K] of int64, in [0, B * M * S), or that bound
// itself for a point that touches no pixel. The second sums, for each pixel, the points that touch it in
// their sorted order, and writes all of grad_value: order[i] is the i-th point (an index into the flat B * Q
// * M * K), first[c], for c in [0, B * M * S], the number of points in cells below c.
// In the fused form the first also leaves softmax[B, Q, M, 2], accumulator type, for the second: the largest
// logit, and 1 over the sum of eq. (8); null in the plain form.
void ms_deform_attn_cells_cuda(const MsDeformAttnParams& params);
void ms_deform_attn_gather_grad_value_cuda(const MsDeformAttnParams& params);

}  // namespace vitkern
