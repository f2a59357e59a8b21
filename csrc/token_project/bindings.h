// SPDX-License-Identifier: Apache-2.0
// token_project in vitkern._C. Shapes, dtypes and devices are checked in Python.
#pragma once

#include "common/bindings.h"
#include "common/cpu_isa.h"
#include "token_project/cpu.h"
#include "token_project/params.h"
#ifdef VITKERN_WITH_CUDA
#include "token_project/cuda.h"
#endif

namespace vitkern::bindings::token_project {

using Inputs = std::array<uintptr_t, 4>;     // x, query, key, tokens
using Gradients = std::array<uintptr_t, 3>;  // of query, key, tokens; 0 = not wanted
using Sizes = std::array<int64_t, 5>;        // B, N, C, T, K

inline TokenProjectParams make_params(const Inputs& inputs, const Sizes& sizes, int32_t dtype) {
  TokenProjectParams params{};
  params.batch = sizes[0];
  params.pixels = sizes[1];
  params.channels = sizes[2];
  params.token_count = sizes[3];
  params.keys = sizes[4];
  params.dtype = static_cast<DType>(dtype);
  params.x = pointer<const void>(inputs[0]);
  params.query = pointer<const void>(inputs[1]);
  params.key = pointer<const void>(inputs[2]);
  params.tokens = pointer<const void>(inputs[3]);
  return params;
}

inline void set_gradients(TokenProjectParams& params, uintptr_t grad_output, const Gradients& gradients) {
  params.grad_output = pointer<const void>(grad_output);
  params.grad_query = pointer<void>(gradients[0]);
  params.grad_key = pointer<void>(gradients[1]);
  params.grad_tokens = pointer<void>(gradients[2]);
}

#ifndef VITKERN_EMULATED
inline void forward_cpu(const Inputs& inputs, uintptr_t output, const Sizes& sizes, int32_t dtype,
                        int threads) {
  TokenProjectParams params = make_params(inputs, sizes, dtype);
  params.output = pointer<void>(output);
  params.threads = threads;
  VITKERN_DISPATCH_ISA(token_project_forward(params));
}

inline void backward_cpu(const Inputs& inputs, uintptr_t grad_output, const Gradients& gradients,
                         const Sizes& sizes, int32_t dtype, int threads) {
  TokenProjectParams params = make_params(inputs, sizes, dtype);
  set_gradients(params, grad_output, gradients);
  params.threads = threads;
  VITKERN_DISPATCH_ISA(token_project_backward(params));
}
#endif

#ifdef VITKERN_WITH_CUDA
inline void forward_cuda(const Inputs& inputs, uintptr_t output, const Sizes& sizes, int32_t dtype,
                         int device, uintptr_t stream) {
  TokenProjectParams params = make_params(inputs, sizes, dtype);
  params.output = pointer<void>(output);
  params.device = device;
  params.stream = pointer<void>(stream);
  token_project_forward_cuda(params);
}

inline void backward_cuda(const Inputs& inputs, uintptr_t grad_output, const Gradients& gradients,
                          uintptr_t workspace, const Sizes& sizes, int32_t dtype, int device,
                          uintptr_t stream) {
  TokenProjectParams params = make_params(inputs, sizes, dtype);
  set_gradients(params, grad_output, gradients);
  params.device = device;
  params.stream = pointer<void>(stream);
  token_project_backward_cuda(params, pointer<void>(workspace));
}

inline int64_t workspace_cuda(const Sizes& sizes, int32_t dtype) {
  return token_project_workspace_cuda(make_params({}, sizes, dtype));
}
#endif

inline void bind(pybind11::module_& m) {
#ifndef VITKERN_EMULATED
  m.def("token_project_forward_cpu", &forward_cpu, WithoutGil());
  m.def("token_project_backward_cpu", &backward_cpu, WithoutGil());
#endif
#ifdef VITKERN_WITH_CUDA
  m.def("token_project_forward_cuda", &forward_cuda, WithoutGil());
  m.def("token_project_backward_cuda", &backward_cuda, WithoutGil());
  m.def("token_project_workspace_cuda", &workspace_cuda);
#endif
}

}  // namespace vitkern::bindings::token_project
