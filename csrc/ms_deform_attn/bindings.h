// SPDX-License-Identifier: Apache-2.0
// ms_deform_attn in vitkern._C. Shapes, dtypes and devices are checked in Python.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/bindings.h"
#include "common/cpu_isa.h"
#include "ms_deform_attn/cpu.h"
#include "ms_deform_attn/params.h"
#ifdef VITKERN_WITH_CUDA
#include "ms_deform_attn/cuda.h"
#endif

namespace vitkern::bindings::ms_deform_attn {

using Sizes = std::array<int64_t, 7>;     // B, S, M, D, Q, L, K
using Inputs = std::array<uintptr_t, 5>;  // value, spatial_shapes, level_start, locations, weights
using Anchors = std::array<int64_t, 5>;   // address of reference points, numbers, strides; zeros: plain form
using Gradients = std::array<uintptr_t, 4>;  // of value, locations, weights, places; 0 = not wanted
using Codes = std::array<int32_t, 3>;        // sampling, value_dtype, coord_dtype

// What every pass on every device is told. `point_end` is empty where all levels have K / L points.
inline MsDeformAttnParams make_params(const Inputs& inputs, const Anchors& anchors, const Sizes& sizes,
                                      const std::vector<int64_t>& point_end, const Codes& codes) {
  MsDeformAttnParams params{};
  params.batch = sizes[0];
  params.pixels = sizes[1];
  params.heads = sizes[2];
  params.channels = sizes[3];
  params.queries = sizes[4];
  params.levels = sizes[5];
  params.points = sizes[6];
  if (point_end.size() > kMaxRaggedLevels || (!point_end.empty() && point_end.back() > UINT16_MAX))
    throw std::invalid_argument("ms_deform_attn: levels of unequal point counts must be at most " +
                                std::to_string(kMaxRaggedLevels) + ", with at most 65535 points in all");
  params.ragged = !point_end.empty();
  for (size_t level = 0; level < point_end.size(); ++level)
    params.point_end[level] = static_cast<uint16_t>(point_end[level]);
  params.sampling = static_cast<Sampling>(codes[0]);
  params.value_dtype = static_cast<DType>(codes[1]);
  params.coord_dtype = static_cast<DType>(codes[2]);
  params.value = pointer<const void>(inputs[0]);
  params.spatial_shapes = pointer<const int64_t>(inputs[1]);
  params.level_start = pointer<const int64_t>(inputs[2]);
  params.locations = pointer<const void>(inputs[3]);
  params.weights = pointer<const void>(inputs[4]);
  params.reference = {pointer<const void>(static_cast<uintptr_t>(anchors[0])), anchors[1], anchors[2],
                      anchors[3], anchors[4]};
  return params;
}

inline void set_gradients(MsDeformAttnParams& params, uintptr_t grad_output, const Gradients& gradients) {
  params.grad_output = pointer<const void>(grad_output);
  params.grad_value = pointer<void>(gradients[0]);
  params.grad_locations = pointer<void>(gradients[1]);
  params.grad_weights = pointer<void>(gradients[2]);
  params.grad_places = pointer<void>(gradients[3]);
}

#ifndef VITKERN_EMULATED
// Whether levels of (height, width) at these first pixels cover [0, pixels) without gap or overlap. Empty ones may
// begin anywhere.
inline bool levels_tile(uintptr_t spatial_shapes, uintptr_t level_start, int64_t levels, int64_t pixels) {
  const auto* shapes = pointer<const int64_t>(spatial_shapes);
  const auto* starts = pointer<const int64_t>(level_start);
  std::vector<std::pair<int64_t, int64_t>> covered;  // first pixel and number of pixels
  for (int64_t level = 0; level < levels; ++level) {
    const int64_t height = shapes[2 * level], width = shapes[2 * level + 1];
    if (height < 0 || width < 0 || (width > 0 && height > pixels / width)) return false;
    if (height * width > 0) covered.emplace_back(starts[level], height * width);
  }
  std::sort(covered.begin(), covered.end());
  int64_t end = 0;
  for (const auto& [start, count] : covered) {
    if (start != end) return false;
    end += count;
    if (end > pixels) return false;
  }
  return end == pixels;
}

inline void forward_cpu(const Inputs& inputs, const Anchors& anchors, uintptr_t output, const Sizes& sizes,
                        const std::vector<int64_t>& point_end, const Codes& codes, int threads) {
  MsDeformAttnParams params = make_params(inputs, anchors, sizes, point_end, codes);
  params.output = pointer<void>(output);
  params.threads = threads;
  VITKERN_DISPATCH_ISA(ms_deform_attn_forward(params));
}

inline void backward_cpu(const Inputs& inputs, const Anchors& anchors, uintptr_t grad_output,
                         const Gradients& gradients, const Sizes& sizes,
                         const std::vector<int64_t>& point_end, const Codes& codes, int threads) {
  MsDeformAttnParams params = make_params(inputs, anchors, sizes, point_end, codes);
  set_gradients(params, grad_output, gradients);
  params.threads = threads;
  VITKERN_DISPATCH_ISA(ms_deform_attn_backward(params));
}
#endif

#ifdef VITKERN_WITH_CUDA
inline void forward_cuda(const Inputs& inputs, const Anchors& anchors, uintptr_t output, const Sizes& sizes,
                         const std::vector<int64_t>& point_end, const Codes& codes, int device,
                         uintptr_t stream) {
  MsDeformAttnParams params = make_params(inputs, anchors, sizes, point_end, codes);
  params.output = pointer<void>(output);
  params.device = device;
  params.stream = pointer<void>(stream);
  ms_deform_attn_forward_cuda(params);
}

inline void backward_cuda(const Inputs& inputs, const Anchors& anchors, uintptr_t grad_output,
                          const Gradients& gradients, const Sizes& sizes,
                          const std::vector<int64_t>& point_end, const Codes& codes, int device,
                          uintptr_t stream) {
  MsDeformAttnParams params = make_params(inputs, anchors, sizes, point_end, codes);
  set_gradients(params, grad_output, gradients);
  params.device = device;
  params.stream = pointer<void>(stream);
  ms_deform_attn_backward_cuda(params);
}

inline void cells_cuda(const Inputs& inputs, const Anchors& anchors, uintptr_t cells, uintptr_t softmax,
                       const Sizes& sizes, const std::vector<int64_t>& point_end, const Codes& codes,
                       int device, uintptr_t stream) {
  MsDeformAttnParams params = make_params(inputs, anchors, sizes, point_end, codes);
  params.device = device;
  params.stream = pointer<void>(stream);
  ms_deform_attn_cells_cuda(params, pointer<int64_t>(cells), pointer<void>(softmax));
}

inline void gather_grad_value_cuda(const Inputs& inputs, const Anchors& anchors, uintptr_t grad_output,
                                   uintptr_t grad_value, uintptr_t order, uintptr_t first, uintptr_t softmax,
                                   const Sizes& sizes, const std::vector<int64_t>& point_end,
                                   const Codes& codes, int device, uintptr_t stream) {
  MsDeformAttnParams params = make_params(inputs, anchors, sizes, point_end, codes);
  set_gradients(params, grad_output, {grad_value, 0, 0, 0});
  params.device = device;
  params.stream = pointer<void>(stream);
  ms_deform_attn_gather_grad_value_cuda(params, pointer<const int64_t>(order), pointer<const int64_t>(first),
                                        pointer<const void>(softmax));
}
#endif

inline void bind(pybind11::module_& m) {
#ifndef VITKERN_EMULATED
  m.def("levels_tile", &levels_tile);
  m.def("ms_deform_attn_forward_cpu", &forward_cpu, WithoutGil());
  m.def("ms_deform_attn_backward_cpu", &backward_cpu, WithoutGil());
#endif
#ifdef VITKERN_WITH_CUDA
  m.def("ms_deform_attn_forward_cuda", &forward_cuda, WithoutGil());
  m.def("ms_deform_attn_backward_cuda", &backward_cuda, WithoutGil());
  m.def("ms_deform_attn_cells_cuda", &cells_cuda, WithoutGil());
  m.def("ms_deform_attn_gather_grad_value_cuda", &gather_grad_value_cuda, WithoutGil());
#endif
}

}  // namespace vitkern::bindings::ms_deform_attn
