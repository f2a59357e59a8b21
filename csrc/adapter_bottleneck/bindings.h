// SPDX-License-Identifier: Apache-2.0
// adapter_bottleneck in vitkern._C. Shapes, dtypes and devices are checked in Python.
#pragma once

#include <utility>

#include "adapter_bottleneck/cpu.h"
#include "adapter_bottleneck/params.h"
#include "common/bindings.h"
#include "common/cpu_isa.h"
#ifdef VITKERN_WITH_CUDA
#include "adapter_bottleneck/cuda.h"
#endif

namespace vitkern::bindings::adapter_bottleneck {

// x, down weight, down bias, up weight, up bias, residual, scale, seed.
using Inputs = std::array<uintptr_t, 8>;
// Of x, down weight, down bias, up weight, up bias, scale; 0 = not wanted.
using Gradients = std::array<uintptr_t, 6>;
using Sizes = std::array<int64_t, 3>;       // N, C, H
using Codes = std::array<int32_t, 3>;       // activation, dtype, whether the residual is x
using Drops = std::pair<uint32_t, double>;  // threshold, rescale

inline AdapterBottleneckParams make_params(const Inputs& inputs, const Sizes& sizes, const Codes& codes,
                                           double factor, const Drops& drops) {
  AdapterBottleneckParams params{};
  params.rows = sizes[0];
  params.channels = sizes[1];
  params.hidden = sizes[2];
  params.activation = static_cast<Activation>(codes[0]);
  params.dtype = static_cast<DType>(codes[1]);
  params.residual_is_x = codes[2] != 0;
  params.factor = factor;
  params.dropout = {pointer<const int64_t>(inputs[7]), drops.first, drops.second};
  params.x = pointer<const void>(inputs[0]);
  params.down_weight = pointer<const void>(inputs[1]);
  params.down_bias = pointer<const void>(inputs[2]);
  params.up_weight = pointer<const void>(inputs[3]);
  params.up_bias = pointer<const void>(inputs[4]);
  params.residual = pointer<const void>(inputs[5]);
  params.scale = pointer<const void>(inputs[6]);
  return params;
}

inline void set_gradients(AdapterBottleneckParams& params, uintptr_t grad_output, uintptr_t kept,
                          const Gradients& gradients) {
  params.grad_output = pointer<const void>(grad_output);
  params.kept = pointer<void>(kept);
  params.grad_x = pointer<void>(gradients[0]);
  params.grad_down_weight = pointer<void>(gradients[1]);
  params.grad_down_bias = pointer<void>(gradients[2]);
  params.grad_up_weight = pointer<void>(gradients[3]);
  params.grad_up_bias = pointer<void>(gradients[4]);
  params.grad_scale = pointer<void>(gradients[5]);
}

#ifndef VITKERN_EMULATED
inline void forward_cpu(const Inputs& inputs, uintptr_t output, uintptr_t kept, const Sizes& sizes,
                        const Codes& codes, double factor, const Drops& drops, int threads) {
  AdapterBottleneckParams params = make_params(inputs, sizes, codes, factor, drops);
  params.output = pointer<void>(output);
  params.kept = pointer<void>(kept);
  params.threads = threads;
  VITKERN_DISPATCH_ISA(adapter_bottleneck_forward(params));
}

inline void backward_cpu(const Inputs& inputs, uintptr_t grad_output, uintptr_t kept,
                         const Gradients& gradients, const Sizes& sizes, const Codes& codes, double factor,
                         const Drops& drops, int threads) {
  AdapterBottleneckParams params = make_params(inputs, sizes, codes, factor, drops);
  set_gradients(params, grad_output, kept, gradients);
  params.threads = threads;
  VITKERN_DISPATCH_ISA(adapter_bottleneck_backward(params));
}
#endif

#ifdef VITKERN_WITH_CUDA
inline void forward_cuda(const Inputs& inputs, uintptr_t output, uintptr_t kept, const Sizes& sizes,
                         const Codes& codes, double factor, const Drops& drops, int device,
                         uintptr_t stream) {
  AdapterBottleneckParams params = make_params(inputs, sizes, codes, factor, drops);
  params.output = pointer<void>(output);
  params.kept = pointer<void>(kept);
  params.device = device;
  params.stream = pointer<void>(stream);
  adapter_bottleneck_forward_cuda(params);
}

inline void backward_cuda(const Inputs& inputs, uintptr_t grad_output, uintptr_t kept,
                          const Gradients& gradients, uintptr_t workspace, const Sizes& sizes,
                          const Codes& codes, double factor, const Drops& drops, int device,
                          uintptr_t stream) {
  AdapterBottleneckParams params = make_params(inputs, sizes, codes, factor, drops);
  set_gradients(params, grad_output, kept, gradients);
  params.device = device;
  params.stream = pointer<void>(stream);
  adapter_bottleneck_backward_cuda(params, pointer<void>(workspace));
}

inline int64_t workspace_cuda(const Sizes& sizes, const Codes& codes) {
  return adapter_bottleneck_workspace_cuda(make_params({}, sizes, codes, 1, {}));
}
#endif

inline void bind(pybind11::module_& m) {
#ifndef VITKERN_EMULATED
  m.def("adapter_bottleneck_forward_cpu", &forward_cpu, WithoutGil());
  m.def("adapter_bottleneck_backward_cpu", &backward_cpu, WithoutGil());
#endif
#ifdef VITKERN_WITH_CUDA
  m.def("adapter_bottleneck_forward_cuda", &forward_cuda, WithoutGil());
  m.def("adapter_bottleneck_backward_cuda", &backward_cuda, WithoutGil());
  m.def("adapter_bottleneck_workspace_cuda", &workspace_cuda);
#endif
}

}  // namespace vitkern::bindings::adapter_bottleneck
