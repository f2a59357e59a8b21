// SPDX-License-Identifier: Apache-2.0
// ms_deform_attn in vitkern._C. Shapes, dtypes and devices are checked in Python.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/bindings.h"
#include "common/cpu_isa.h"
#include "host/function.h"
#include "host/lend.h"
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
inline MsDeformAttnParams make_params(const Inputs& inputs, const Sizes& sizes, const Anchors& anchors,
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

// Whether levels of (height, width) at these first pixels cover [0, pixels) without gap or overlap. Empty ones may
// begin anywhere.
inline bool levels_tile(const int64_t* shapes, const int64_t* starts, int64_t levels, int64_t pixels) {
  int64_t end = 0, level = 0;  // one after the other, as nearly always
  for (; level < levels && starts[level] == end; ++level) {
    const int64_t height = shapes[2 * level], width = shapes[2 * level + 1];
    if (height < 0 || width < 0 || (width > 0 && height > pixels / width)) return false;
    end += height * width;
  }
  if (level == levels) return end == pixels;

  std::vector<std::pair<int64_t, int64_t>> covered;  // first pixel and number of pixels
  for (level = 0; level < levels; ++level) {
    const int64_t height = shapes[2 * level], width = shapes[2 * level + 1];
    if (height < 0 || width < 0 || (width > 0 && height > pixels / width)) return false;
    if (height * width > 0) covered.emplace_back(starts[level], height * width);
  }
  std::sort(covered.begin(), covered.end());
  end = 0;
  for (const auto& [start, count] : covered) {
    if (start != end) return false;
    end += count;
    if (end > pixels) return false;
  }
  return end == pixels;
}

// The forward pass on tensors of one description, as a Python function of the op's tensors, contiguous and of the right
// types, that returns the output.
class Forward {
 public:
  using Launch = void (*)(const MsDeformAttnParams&);

  // lends: what Lender asks. device: the tensors' GPU, or -1. where: a function that gives the stream there, or the number
  // of threads. complain: a function of value, spatial_shapes and level_start_index that raises what is wrong with the
  // levels, if anything is.
  Forward(Launch launch, const MsDeformAttnParams& params, const pybind11::object& lends, int device,
          pybind11::object where, pybind11::object complain)
      : launch_(launch),
        params_(params),
        lender_(lends),
        on_cpu_(device < 0),
        where_(std::move(where)),
        complain_(std::move(complain)),
        new_empty_("new_empty"),
        data_ptr_("data_ptr"),
        shape_{pybind11::int_(params.batch), pybind11::int_(params.queries),
               pybind11::int_(params.heads * params.channels)} {
    params_.device = std::max(device, 0);
  }

  pybind11::object operator()(Arguments tensors, Py_ssize_t count) const {
    const bool fused = params_.reference.numbers != 0;  // then reference points come fourth
    if (count != 5 + fused) throw std::invalid_argument("ms_deform_attn: a wrong number of tensors");
    MsDeformAttnParams params = params_;
    params.value = address(tensors, 0);
    params.spatial_shapes = static_cast<const int64_t*>(address(tensors, 1));
    params.level_start = static_cast<const int64_t*>(address(tensors, 2));
    if (fused) params.reference.points = address(tensors, 3);
    params.locations = address(tensors, 3 + fused);
    params.weights = address(tensors, 4 + fused);
    if (suspicious(params)) checked(PyObject_Vectorcall(complain_.ptr(), tensors, 3, nullptr));

    PyObject* const of_output[] = {tensors[0], shape_[0].ptr(), shape_[1].ptr(), shape_[2].ptr()};
    pybind11::object output =
        checked(PyObject_VectorcallMethod(new_empty_.ptr(), of_output, std::size(of_output), nullptr));
    params.output = PyLong_AsVoidPtr(checked(PyObject_CallMethodNoArgs(output.ptr(), data_ptr_.ptr())).ptr());
    const auto where =
        reinterpret_cast<intptr_t>(PyLong_AsVoidPtr(checked(PyObject_CallNoArgs(where_.ptr())).ptr()));
    params.threads = on_cpu_ ? static_cast<int32_t>(where) : 0;
    params.stream = on_cpu_ ? nullptr : pointer<void>(where);
    const pybind11::gil_scoped_release released;
    launch_(params);
    return output;
  }

 private:
  const void* address(Arguments tensors, Py_ssize_t position) const {
    if (const Lent* known = Lendings::find(tensors[position], position)) return known->address();
    Lent lent;
    if (!lender_(tensors[position], lent))
      throw std::invalid_argument("ms_deform_attn: a tensor without memory of its own");
    return lent.address();
  }

  // Whether the levels have to be looked at. On a GPU, where that waits, only if VITKERN_VALIDATE=1.
  bool suspicious(const MsDeformAttnParams& params) const {
    if (on_cpu_) return !levels_tile(params.spatial_shapes, params.level_start, params.levels, params.pixels);
    const char* asked = std::getenv("VITKERN_VALIDATE");
    return asked != nullptr && std::strcmp(asked, "1") == 0;
  }

  Launch launch_;
  MsDeformAttnParams params_;
  Lender lender_;
  bool on_cpu_;
  pybind11::object where_, complain_;
  pybind11::str new_empty_, data_ptr_;
  pybind11::int_ shape_[3];
};

template <Forward::Launch kLaunch>
pybind11::object make_forward(const Sizes& sizes, const Anchors& anchors,
                              const std::vector<int64_t>& point_end, const Codes& codes,
                              const pybind11::object& lends, int device, pybind11::object where,
                              pybind11::object complain) {
  return make_function(Forward(kLaunch, make_params({}, sizes, anchors, point_end, codes), lends, device,
                               std::move(where), std::move(complain)));
}

#ifndef VITKERN_EMULATED
inline void forward_cpu(const MsDeformAttnParams& params) {
  VITKERN_DISPATCH_ISA(ms_deform_attn_forward(params));
}

inline void backward_cpu(const Inputs& inputs, uintptr_t grad_output, const Gradients& gradients,
                         const Sizes& sizes, const Anchors& anchors, const std::vector<int64_t>& point_end,
                         const Codes& codes, int threads) {
  MsDeformAttnParams params = make_params(inputs, sizes, anchors, point_end, codes);
  set_gradients(params, grad_output, gradients);
  params.threads = threads;
  VITKERN_DISPATCH_ISA(ms_deform_attn_backward(params));
}
#endif

#ifdef VITKERN_WITH_CUDA
inline void backward_cuda(const Inputs& inputs, uintptr_t grad_output, const Gradients& gradients,
                          const Sizes& sizes, const Anchors& anchors, const std::vector<int64_t>& point_end,
                          const Codes& codes, int device, uintptr_t stream) {
  MsDeformAttnParams params = make_params(inputs, sizes, anchors, point_end, codes);
  set_gradients(params, grad_output, gradients);
  params.device = device;
  params.stream = pointer<void>(stream);
  ms_deform_attn_backward_cuda(params);
}

inline void cells_cuda(const Inputs& inputs, uintptr_t cells, uintptr_t softmax, const Sizes& sizes,
                       const Anchors& anchors, const std::vector<int64_t>& point_end, const Codes& codes,
                       int device, uintptr_t stream) {
  MsDeformAttnParams params = make_params(inputs, sizes, anchors, point_end, codes);
  params.device = device;
  params.stream = pointer<void>(stream);
  ms_deform_attn_cells_cuda(params, pointer<int64_t>(cells), pointer<void>(softmax));
}

inline void gather_grad_value_cuda(const Inputs& inputs, uintptr_t grad_output, uintptr_t grad_value,
                                   uintptr_t order, uintptr_t first, uintptr_t softmax, const Sizes& sizes,
                                   const Anchors& anchors, const std::vector<int64_t>& point_end,
                                   const Codes& codes, int device, uintptr_t stream) {
  MsDeformAttnParams params = make_params(inputs, sizes, anchors, point_end, codes);
  set_gradients(params, grad_output, {grad_value, 0, 0, 0});
  params.device = device;
  params.stream = pointer<void>(stream);
  ms_deform_attn_gather_grad_value_cuda(params, pointer<const int64_t>(order), pointer<const int64_t>(first),
                                        pointer<const void>(softmax));
}
#endif

inline void bind(pybind11::module_& m) {
#ifndef VITKERN_EMULATED
  m.def("levels_tile", [](uintptr_t shapes, uintptr_t starts, int64_t levels, int64_t pixels) {
    return levels_tile(pointer<const int64_t>(shapes), pointer<const int64_t>(starts), levels, pixels);
  });
  m.def("ms_deform_attn_forward_cpu", &make_forward<forward_cpu>);
  m.def("ms_deform_attn_backward_cpu", &backward_cpu, WithoutGil());
#endif
#ifdef VITKERN_WITH_CUDA
  m.def("ms_deform_attn_forward_cuda", &make_forward<ms_deform_attn_forward_cuda>);
  m.def("ms_deform_attn_backward_cuda", &backward_cuda, WithoutGil());
  m.def("ms_deform_attn_cells_cuda", &cells_cuda, WithoutGil());
  m.def("ms_deform_attn_gather_grad_value_cuda", &gather_grad_value_cuda, WithoutGil());
#endif
}

}  // namespace vitkern::bindings::ms_deform_attn
