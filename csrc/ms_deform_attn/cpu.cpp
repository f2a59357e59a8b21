// SPDX-License-Identifier: Apache-2.0
// The entry points: read the levels, then choose the kernel for the element types and the sampling method.
#include "ms_deform_attn/cpu.h"

#include <stdexcept>

#include "common/dispatch.h"
#include "ms_deform_attn/cpu_backward.h"
#include "ms_deform_attn/cpu_forward.h"

namespace vitkern::VITKERN_ISA {
namespace {

// Shapes come from the user's tensors: what would read outside of value is an error, not a crash.
void read_levels(const MsDeformAttnParams& p, Level* levels) {
  for (int64_t i = 0; i < p.levels; ++i) {
    Level& level = levels[i];
    level.index = i;
    level.height = p.spatial_shapes[2 * i];
    level.width = p.spatial_shapes[2 * i + 1];
    level.start = p.level_start[i];
    level.first_point = i == 0 ? 0 : levels[i - 1].last_point;
    level.last_point = p.ragged ? p.point_end[i] : (i + 1) * (p.points / p.levels);
    const bool sized = level.height >= 0 && level.width >= 0;
    if (sized && (level.height == 0 || level.width == 0)) {
      // It may begin anywhere, and its other side may be of any length.
      level.height = level.width = level.start = 0;
      continue;
    }
    const bool starts = sized && level.start >= 0 && level.start <= p.pixels;
    if (!starts || level.height > (p.pixels - level.start) / level.width)
      throw std::invalid_argument("ms_deform_attn: a level of spatial_shapes reaches outside of value");
  }
}

// Rows are 32-bit numbers beside 32-bit floats.
void check_sizes(const MsDeformAttnParams& p) {
  if (p.pixels > INT32_MAX) throw std::invalid_argument("ms_deform_attn: value has 2^31 pixels or more");
}

// If rows have no channels, nothing depends on locations and weights.
void clear_point_gradients(const MsDeformAttnParams& p) {
  const size_t points = p.batch * p.queries * p.heads * p.points;
  if (p.grad_locations) memset(p.grad_locations, 0, 2 * points * bytes(p.coord_dtype));
  if (p.grad_weights) memset(p.grad_weights, 0, points * bytes(p.coord_dtype));
  if (p.grad_computed) memset(p.grad_computed, 0, 2 * points * bytes(accumulator(p.value_dtype)));
}

}  // namespace

void ms_deform_attn_forward(const MsDeformAttnParams& p) {
  check_sizes(p);
  if (p.batch * p.queries * p.heads * p.channels == 0) return;
  const Scratch scratch((p.levels + 1) * sizeof(Level));
  Level* const levels = reinterpret_cast<Level*>(scratch.data());
  read_levels(p, levels);
  dispatch_dtype(p.value_dtype, [&](auto value) {
    using T = decltype(value);
    if (kIsAvx512 || p.sampling == Sampling::kBilinear) return forward<kCorners, T>(p, levels);
    if constexpr (!kIsAvx512) forward<1, T>(p, levels);
  });
}

void ms_deform_attn_backward(const MsDeformAttnParams& p) {
  check_sizes(p);
  if (p.batch * p.heads == 0 || !(p.grad_value || wants_points(p))) return;
  if (p.channels == 0) return clear_point_gradients(p);
  const Scratch scratch((p.levels + 1) * (sizeof(Level) + sizeof(Group)));
  Level* const levels = reinterpret_cast<Level*>(scratch.data());
  read_levels(p, levels);
  Group* const groups = reinterpret_cast<Group*>(levels + p.levels + 1);
  dispatch_dtype(p.value_dtype, [&](auto value) {
    using T = decltype(value);
    if (kIsAvx512 || p.sampling == Sampling::kBilinear) return backward<kCorners, T>(p, levels, groups);
    if constexpr (!kIsAvx512) backward<1, T>(p, levels, groups);
  });
}

}  // namespace vitkern::VITKERN_ISA
