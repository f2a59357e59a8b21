// SPDX-License-Identifier: Apache-2.0
// Picks and starts the CUDA kernels of ms_deform_attn.
#include "ms_deform_attn/cuda.h"

#include <algorithm>
#include <iterator>

#include "common/dispatch.cuh"
#include "ms_deform_attn/backward.cuh"
#include "ms_deform_attn/deterministic.cuh"
#include "ms_deform_attn/forward.cuh"

namespace vitkern {
namespace {

constexpr int64_t kMax31Bits = 0x7fffffff;

[[noreturn]] void refuse(const char* what) {
  throw std::runtime_error(std::string("vitkern: ms_deform_attn on CUDA: ") + what);
}

// Checks what the kernels' 32-bit arithmetic relies on. `rows` are what an image's teams of `lanes` share
// with its heads: queries, or pixels; `pixel_step` leads from pixel to pixel, in the unit of Corners::offset.
Task make_task(const MsDeformAttnParams& p, int64_t rows, int lanes, int64_t pixel_step) {
  if (p.pixels > kMax31Bits) refuse("more than 2^31 - 1 pixels an image");
  if (p.points > 1 << 20) refuse("more than 2^20 points a query and head");
  if (p.pixels * pixel_step > 2 * kMax31Bits) refuse("an image of value has too many elements");
  if (rows * p.heads > kMax31Bits) refuse("more than 2^31 - 1 pairs of query, or pixel, and head an image");
  Task task{};
  task.pixels = static_cast<uint32_t>(p.pixels);
  task.heads = static_cast<uint32_t>(p.heads);
  task.channels = static_cast<uint32_t>(p.channels);
  task.levels = static_cast<uint32_t>(p.levels);
  task.points = static_cast<uint32_t>(p.points);
  task.teams = static_cast<uint32_t>(rows * p.heads);
  task.blocks = (task.teams + kThreads / lanes - 1) / (kThreads / lanes);
  if (p.batch * task.blocks > kMax31Bits) refuse("more than 2^31 - 1 blocks");
  task.pixel_step = static_cast<uint32_t>(pixel_step);
  task.point_reciprocal = p.points > 1 ? ~uint64_t{0} / p.points + 1 : 0;
  task.levels_per_point = static_cast<float>(p.levels) / static_cast<float>(p.points);
  task.half_of_that = task.levels_per_point / 2;
  task.points_per_level = static_cast<uint32_t>(p.levels ? p.points / p.levels : 0);
  task.ragged = p.ragged != 0;
  task.nearest = p.sampling == Sampling::kNearest;
  task.wide = p.coord_dtype != p.value_dtype || p.value_dtype == accumulator(p.value_dtype);
  std::copy(std::begin(p.point_end), std::end(p.point_end), task.point_end);
  task.value = p.value;
  task.locations = p.locations;
  task.weights = p.weights;
  task.grad_output = p.grad_output;
  task.spatial_shapes = p.spatial_shapes;
  task.level_start = p.level_start;
  task.reference = p.reference;
  task.queries = static_cast<uint32_t>(p.queries);
  task.output = p.output;
  task.grad_value = p.grad_value;
  task.grad_locations = p.grad_locations;
  task.grad_weights = p.grad_weights;
  task.grad_computed = p.grad_computed;
  task.point_gradients = p.grad_locations || p.grad_weights || p.grad_computed;
  return task;
}

template <typename Call>
void dispatch_form(const MsDeformAttnParams& p, const Call& call) {
  if (p.reference.points) return call(std::true_type{});
  return call(std::false_type{});
}

// Calls with the value's type, the number of channels where whole vectors can be loaded, else 0, and
// whether the form is the fused one. Doubles, which serve to check gradients, do without vectors: the
// build is faster.
template <typename Call>
void dispatch(const MsDeformAttnParams& p, const Call& call) {
  const bool knows_method = !p.reference.points || p.sampling == Sampling::kBilinear;
  const bool vectors = knows_method && aligned(p.value) && aligned(p.output) && aligned(p.grad_output) &&
                       aligned(p.grad_value);
  dispatch_dtype(p.value_dtype, [&](auto type) {
    constexpr bool kDouble = std::is_same_v<typename decltype(type)::type, double>;
    const auto call_form = [&](auto channels) {
      constexpr std::integral_constant<int, kDouble ? 0 : decltype(channels)::value> used{};
      return dispatch_form(p, [&](auto fused) { return call(type, used, fused); });
    };
    switch (vectors ? p.channels : 0) {
      case 16:
        return call_form(std::integral_constant<int, 16>{});
      case 32:
        return call_form(std::integral_constant<int, 32>{});
      case 64:
        return call_form(std::integral_constant<int, 64>{});
      default:
        return call_form(std::integral_constant<int, 0>{});
    }
  });
}

// One team for each image, row and head.
template <typename T, typename Kernel, typename... Arguments>
void launch_teams(const char* name, Kernel kernel, const MsDeformAttnParams& p, int64_t rows, int lanes,
                  int64_t pixel_step, const Arguments&... arguments) {
  if (p.levels * sizeof(Level<Accumulator<T>>) > kLevelBytes)
    refuse("more than 1024 levels, of float64 more than 512");
  const Task task = make_task(p, rows, lanes, pixel_step);
  launch(name, kernel, dim3(static_cast<unsigned>(p.batch * task.blocks)), dim3(kThreads),
         task.levels * sizeof(Level<Accumulator<T>>), p.stream, task, arguments...);
}

void zero(void* address, int64_t elements, DType dtype, void* stream) {
  if (address && elements)
    check_cuda(cudaMemsetAsync(address, 0, elements * bytes(dtype), static_cast<cudaStream_t>(stream)),
               "cudaMemsetAsync");
}

}  // namespace

void ms_deform_attn_forward_cuda(const MsDeformAttnParams& p) {
  const int64_t outputs = p.batch * p.queries * p.heads * p.channels;
  if (outputs == 0) return;
  const DeviceGuard guard(p.device);
  if (p.pixels == 0 || p.points == 0) return zero(p.output, outputs, p.value_dtype, p.stream);
  dispatch(p, [&](auto type, auto channels, auto fused) {
    using T = typename decltype(type)::type;
    constexpr int kChannels = decltype(channels)::value;
    using Split = Team<T, kChannels>;
    launch_teams<T>("ms_deform_attn_forward", ms_deform_attn_forward<T, kChannels, fused.value>, p, p.queries,
                    Split::kLanes, p.heads * p.channels / Split::kVector);
  });
}

void ms_deform_attn_backward_cuda(const MsDeformAttnParams& p) {
  const int64_t points = p.batch * p.queries * p.heads * p.points;
  if (points == 0) return;
  const DeviceGuard guard(p.device);
  if (p.pixels == 0 || p.channels == 0) {
    zero(p.grad_locations, 2 * points, p.coord_dtype, p.stream);
    zero(p.grad_computed, 2 * points, accumulator(p.value_dtype), p.stream);
    const bool fused = p.reference.points;
    return zero(p.grad_weights, points, fused ? accumulator(p.value_dtype) : p.coord_dtype, p.stream);
  }
  dispatch(p, [&](auto type, auto channels, auto fused) {
    using T = typename decltype(type)::type;
    constexpr int kChannels = decltype(channels)::value;
    using Split = Team<T, kChannels>;
    launch_teams<T>("ms_deform_attn_backward", ms_deform_attn_backward<T, kChannels, fused.value>, p,
                    p.queries, Split::kLanes, p.heads * p.channels / Split::kVector);
  });
}

void ms_deform_attn_cells_cuda(const MsDeformAttnParams& p) {
  if (p.batch * p.queries * p.heads * p.points == 0) return;
  const DeviceGuard guard(p.device);
  dispatch_dtype(p.value_dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch_teams<T>("ms_deform_attn_cells",
                    p.reference.points ? ms_deform_attn_cells<T, true> : ms_deform_attn_cells<T, false>, p,
                    p.queries, kFilingLanes, 1, p.cells, p.batch * p.heads * p.pixels,
                    static_cast<Accumulator<T>*>(p.softmax));
  });
}

void ms_deform_attn_gather_grad_value_cuda(const MsDeformAttnParams& p) {
  if (p.batch * p.pixels * p.heads * p.channels == 0) return;
  const DeviceGuard guard(p.device);
  if (p.batch * p.queries * p.points > int64_t{1} << 44) refuse("more than 2^44 points");
  // One channel a lane, whatever their number: a team still reads whole lines, and the build is faster.
  dispatch_dtype(p.value_dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_form(p, [&](auto fused) {
      launch_teams<T>("ms_deform_attn_gather_grad_value", ms_deform_attn_gather_grad_value<T, fused.value>, p,
                      p.pixels, kWarpLanes, 1, p.order, p.first,
                      static_cast<const Accumulator<T>*>(p.softmax));
    });
  });
}

}  // namespace vitkern
