// SPDX-License-Identifier: Apache-2.0
// adapter_bottleneck in vitkern._C: fills the kernel's parameters from tensors and options.
#pragma once

#include "adapter_bottleneck/cpu.h"
#include "adapter_bottleneck/params.h"
#include "host/call.h"
#ifdef VITKERN_WITH_CUDA
#include "adapter_bottleneck/cuda.h"
#endif

namespace vitkern::bindings::adapter_bottleneck {

// in: x, down weight and bias, up weight and bias, residual, scale, seed.
inline void read_inputs(AdapterBottleneckParams& p, const TensorView* in) {
  p.rows = in[0].rows();
  p.hidden = in[1].size(0);
  p.channels = in[1].size(1);
  p.dtype = in[0].dtype();
  p.x = in[0].address();
  p.down_weight = in[1].address();
  p.down_bias = in[2].address();
  p.up_weight = in[3].address();
  p.up_bias = in[4].address();
  p.residual = in[5].address();
  p.scale = in[6].address();
  p.dropout.seed = in[7].as<const int64_t>();
}

inline void read_forward(AdapterBottleneckParams& p, const TensorView* in, const TensorView* out) {
  read_inputs(p, in);
  p.output = out[0].address();
  p.kept = out[1].rows() == p.rows ? out[1].address() : nullptr;
}

// The residual is None, not saved: its gradient is grad_output.
inline void read_backward(AdapterBottleneckParams& p, const TensorView* in, const TensorView* out) {
  p.grad_output = in[0].address();
  read_inputs(p, in + 1);
  p.kept = in[9].rows() == p.rows ? in[9].address() : nullptr;
  p.grad_x = out[0].address();
  p.grad_down_weight = out[1].address();
  p.grad_down_bias = out[2].address();
  p.grad_up_weight = out[3].address();
  p.grad_up_bias = out[4].address();
  p.grad_scale = out[5].address();
}

inline const Pass<AdapterBottleneckParams> kForward{"adapter_bottleneck",
                                                    8,
                                                    2,
                                                    read_forward,
                                                    adapter_bottleneck_forward_cpu,
                                                    VITKERN_CUDA(adapter_bottleneck_forward_cuda)};
inline const Pass<AdapterBottleneckParams> kBackward{"adapter_bottleneck",
                                                     10,
                                                     6,
                                                     read_backward,
                                                     adapter_bottleneck_backward_cpu,
                                                     VITKERN_CUDA(adapter_bottleneck_backward_cuda),
                                                     VITKERN_CUDA(adapter_bottleneck_workspace_cuda),
                                                     true};

inline AdapterBottleneckParams options(const std::string& activation, double factor, bool residual_is_x,
                                       uint32_t threshold, double rescale) {
  AdapterBottleneckParams p{};
  p.activation = activation == "relu"   ? Activation::kRelu
                 : activation == "gelu" ? Activation::kGelu
                                        : Activation::kSilu;
  p.factor = factor;
  p.residual_is_x = residual_is_x;
  p.dropout = {nullptr, threshold, rescale};
  return p;
}

template <const Pass<AdapterBottleneckParams>& kPass>
pybind11::object make(const Host& host, const pybind11::iterable& outputs, const std::string& activation,
                      double factor, bool residual_is_x, uint32_t threshold, double rescale) {
  return make_call(kPass, host, options(activation, factor, residual_is_x, threshold, rescale), outputs);
}

inline void bind(pybind11::class_<Host>& host) {
  using pybind11::arg;
  const auto define = [&](const char* name, auto* function) {
    host.def(name, function, arg("outputs"), pybind11::kw_only(), arg("activation"), arg("factor"),
             arg("residual_is_x"), arg("threshold"), arg("rescale"));
  };
  define("adapter_bottleneck_forward", &make<kForward>);
  define("adapter_bottleneck_backward", &make<kBackward>);
}

}  // namespace vitkern::bindings::adapter_bottleneck
