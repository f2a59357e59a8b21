// SPDX-License-Identifier: Apache-2.0
// ms_deform_attn and ms_deform_attn_fused in vitkern._C: fills the kernels' parameters from tensors and options.
//
// The two ops differ in that the fused one has reference points before the locations, which are offsets then.
#pragma once

#include <string>
#include <vector>

#include "host/call.h"
#include "ms_deform_attn/cpu.h"
#include "ms_deform_attn/levels.h"
#include "ms_deform_attn/params.h"
#ifdef VITKERN_WITH_CUDA
#include "ms_deform_attn/cuda.h"
#endif

namespace vitkern::bindings::ms_deform_attn {

// in: value, spatial shapes, level starts, reference points if fused, locations, weights. Levels in the host's memory
// are checked; those on a card only where the user asks for it (ops/levels.py).
template <bool kFused>
void read_inputs(MsDeformAttnParams& p, const TensorView* in) {
  const TensorView &value = in[0], &shapes = in[1], &starts = in[2];
  const TensorView &locations = in[3 + kFused], &weights = in[4 + kFused];
  p.batch = value.size(0);
  p.pixels = value.size(1);
  p.heads = value.size(2);
  p.channels = value.size(3);
  p.queries = weights.size(1);
  p.levels = shapes.size(0);
  p.value_dtype = value.dtype();
  p.coord_dtype = weights.dtype();
  p.value = value.address();
  p.spatial_shapes = shapes.as<const int64_t>();
  p.level_start = starts.as<const int64_t>();
  p.locations = locations.address();
  p.weights = weights.address();
  if constexpr (kFused) {
    const TensorView& points = in[3];
    const int64_t of_level = points.size(3), of_query = points.size(2) * of_level;
    p.reference = {points.address(), of_level, points.size(0) > 1 ? p.queries * of_query : 0, of_query,
                   points.size(2) > 1 ? of_level : 0};
  }
  if (shapes.device_type == kCpu && p.checks_levels)
    check_levels(kFused ? "ms_deform_attn_fused" : "ms_deform_attn", p.spatial_shapes, p.level_start,
                 p.levels, p.pixels);
}

template <bool kFused>
void read_forward(MsDeformAttnParams& p, const TensorView* in, const TensorView* out) {
  read_inputs<kFused>(p, in);
  p.output = out[0].address();
}

// The gradients are in the order of the tensors; the gradient of the locations replaces that of the reference points.
template <bool kFused>
void read_backward(MsDeformAttnParams& p, const TensorView* in, const TensorView* out) {
  p.grad_output = in[0].address();
  read_inputs<kFused>(p, in + 1);
  p.grad_value = out[0].address();
  if constexpr (kFused) p.grad_computed = out[1].address();
  p.grad_locations = out[1 + kFused].address();
  p.grad_weights = out[2 + kFused].address();
}

template <bool kFused>
void read_cells(MsDeformAttnParams& p, const TensorView* in, const TensorView* out) {
  read_inputs<kFused>(p, in);
  p.cells = out[0].as<int64_t>();
  if constexpr (kFused) p.softmax = out[1].address();
}

// in: grad_output, order, first, softmax if fused, and the inputs.
template <bool kFused>
void read_gather(MsDeformAttnParams& p, const TensorView* in, const TensorView* out) {
  p.grad_output = in[0].address();
  p.order = in[1].as<const int64_t>();
  p.first = in[2].as<const int64_t>();
  if constexpr (kFused) p.softmax = in[3].address();
  read_inputs<kFused>(p, in + 3 + kFused);
  p.grad_value = out[0].address();
}

using MsDeformAttnPass = Pass<MsDeformAttnParams>;

template <bool kFused>
inline const MsDeformAttnPass kForward{"ms_deform_attn",
                                       5 + kFused,
                                       1,
                                       read_forward<kFused>,
                                       ms_deform_attn_forward_cpu,
                                       VITKERN_CUDA(ms_deform_attn_forward_cuda)};
template <bool kFused>
inline const MsDeformAttnPass kBackward{"ms_deform_attn",
                                        6 + kFused,
                                        3 + kFused,
                                        read_backward<kFused>,
                                        ms_deform_attn_backward_cpu,
                                        VITKERN_CUDA(ms_deform_attn_backward_cuda),
                                        nullptr,
                                        true};
template <bool kFused>
inline const MsDeformAttnPass kCells{"ms_deform_attn",   5 + kFused, 1 + kFused,
                                     read_cells<kFused>, {},         VITKERN_CUDA(ms_deform_attn_cells_cuda)};
template <bool kFused>
inline const MsDeformAttnPass kGather{"ms_deform_attn",
                                      8 + 2 * kFused,
                                      1,
                                      read_gather<kFused>,
                                      {},
                                      VITKERN_CUDA(ms_deform_attn_gather_grad_value_cuda)};

inline MsDeformAttnParams options(const std::vector<int64_t>& points_per_level, const std::string& method,
                                  bool checks_levels) {
  MsDeformAttnParams p{};
  p.sampling = method == "nearest" ? Sampling::kNearest : Sampling::kBilinear;
  p.checks_levels = checks_levels;
  for (const int64_t points : points_per_level) {
    p.points += points;
    p.ragged = p.ragged || points != points_per_level.front();
  }
  if (!p.ragged) return p;
  if (points_per_level.size() > kMaxRaggedLevels || p.points > UINT16_MAX)
    throw std::invalid_argument(
        "ms_deform_attn: levels of unequal point counts must be at most " + std::to_string(kMaxRaggedLevels) +
        ", with at most 65535 points in all, got " + std::to_string(points_per_level.size()) +
        " levels with " + std::to_string(p.points) + " points");
  int64_t end = 0;
  for (size_t level = 0; level < points_per_level.size(); ++level)
    p.point_end[level] = static_cast<uint16_t>(end += points_per_level[level]);
  return p;
}

template <const MsDeformAttnPass& kPlain, const MsDeformAttnPass& kFused>
pybind11::object make(const Host& host, const pybind11::iterable& outputs, bool fused,
                      const std::vector<int64_t>& points_per_level, const std::string& method,
                      bool checks_levels) {
  return make_call(fused ? kFused : kPlain, host, options(points_per_level, method, checks_levels), outputs);
}

inline bool is_table(const TensorView& view, int32_t dims) {
  return view.type_code == kInteger && view.type_bits == 64 && view.dims == dims &&
         view.device_type == kCpu && view.is_contiguous();
}

inline void bind(pybind11::class_<Host>& host) {
  using pybind11::arg;
  const auto define = [&](const char* name, auto* function) {
    host.def(name, function, arg("outputs"), pybind11::kw_only(), arg("fused"), arg("points_per_level"),
             arg("method"), arg("checks_levels") = true);
  };
  define("ms_deform_attn_forward", &make<kForward<false>, kForward<true>>);
  define("ms_deform_attn_backward", &make<kBackward<false>, kBackward<true>>);
  define("ms_deform_attn_cells", &make<kCells<false>, kCells<true>>);
  define("ms_deform_attn_gather_grad_value", &make<kGather<false>, kGather<true>>);
  host.def("check_levels", [](const Host& host, const std::string& op, const pybind11::object& shapes,
                              const pybind11::object& starts, int64_t pixels) {
    TensorView sizes, firsts;
    if (!host.borrow(shapes, sizes) || !host.borrow(starts, firsts) || !is_table(sizes, 2) ||
        !is_table(firsts, 1) || sizes.size(1) != 2 || firsts.size(0) != sizes.size(0))
      throw std::invalid_argument(op + ": levels must be contiguous int64 tables in the host's memory");
    check_levels(op.c_str(), sizes.as<const int64_t>(), firsts.as<const int64_t>(), sizes.size(0), pixels);
  });
}

}  // namespace vitkern::bindings::ms_deform_attn
