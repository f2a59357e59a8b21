// SPDX-License-Identifier: Apache-2.0
// token_pool in vitkern._C. Shapes, dtypes and devices are checked in Python.
#pragma once

#include "common/bindings.h"
#include "common/cpu_isa.h"
#include "token_pool/cpu.h"
#include "token_pool/params.h"
#ifdef VITKERN_WITH_CUDA
#include "token_pool/cuda.h"
#endif

namespace vitkern::bindings::token_pool {

using Inputs = std::array<uintptr_t, 2>;     // x, weight
using Forward = std::array<uintptr_t, 3>;    // grad_output, and what forward gave: tokens, statistics
using Gradients = std::array<uintptr_t, 2>;  // of x, weight; 0 = not wanted
using Sizes = std::array<int64_t, 4>;        // B, N, C, T
using Codes = std::array<int32_t, 2>;        // whether there is a weight per image, dtype

inline TokenPoolParams make_params(const Inputs& inputs, const Sizes& sizes, const Codes& codes) {
  TokenPoolParams params{};
  params.batch = sizes[0];
  params.pixels = sizes[1];
  params.channels = sizes[2];
  params.tokens = sizes[3];
  params.weight_per_image = codes[0] != 0;
  params.dtype = static_cast<DType>(codes[1]);
  params.x = pointer<const void>(inputs[0]);
  params.weight = pointer<const void>(inputs[1]);
  return params;
}

inline void set_gradients(TokenPoolParams& params, const Forward& forward, const Gradients& gradients) {
  params.grad_output = pointer<const void>(forward[0]);
  params.pooled = pointer<const void>(forward[1]);
  params.statistics = pointer<void>(forward[2]);
  params.grad_x = pointer<void>(gradients[0]);
  params.grad_weight = pointer<void>(gradients[1]);
}

#ifndef VITKERN_EMULATED
inline void forward_cpu(const Inputs& inputs, uintptr_t output, uintptr_t statistics, const Sizes& sizes,
                        const Codes& codes, int threads) {
  TokenPoolParams params = make_params(inputs, sizes, codes);
  params.output = pointer<void>(output);
  params.statistics = pointer<void>(statistics);
  params.threads = threads;
  VITKERN_DISPATCH_ISA(token_pool_forward(params));
}

inline void backward_cpu(const Inputs& inputs, const Forward& forward, const Gradients& gradients,
                         const Sizes& sizes, const Codes& codes, int threads) {
  TokenPoolParams params = make_params(inputs, sizes, codes);
  set_gradients(params, forward, gradients);
  params.threads = threads;
  VITKERN_DISPATCH_ISA(token_pool_backward(params));
}
#endif

#ifdef VITKERN_WITH_CUDA
inline void forward_cuda(const Inputs& inputs, uintptr_t output, uintptr_t statistics, uintptr_t workspace,
                         const Sizes& sizes, const Codes& codes, int device, uintptr_t stream) {
  TokenPoolParams params = make_params(inputs, sizes, codes);
  params.output = pointer<void>(output);
  params.statistics = pointer<void>(statistics);
  params.device = device;
  params.stream = pointer<void>(stream);
  token_pool_forward_cuda(params, pointer<void>(workspace));
}

inline void backward_cuda(const Inputs& inputs, const Forward& forward, const Gradients& gradients,
                          uintptr_t workspace, const Sizes& sizes, const Codes& codes, int device,
                          uintptr_t stream) {
  TokenPoolParams params = make_params(inputs, sizes, codes);
  set_gradients(params, forward, gradients);
  params.device = device;
  params.stream = pointer<void>(stream);
  token_pool_backward_cuda(params, pointer<void>(workspace));
}

inline int64_t workspace_cuda(const Sizes& sizes, const Codes& codes, bool backward) {
  return token_pool_workspace_cuda(make_params({}, sizes, codes), backward);
}
#endif

inline void bind(pybind11::module_& m) {
#ifndef VITKERN_EMULATED
  m.def("token_pool_forward_cpu", &forward_cpu, WithoutGil());
  m.def("token_pool_backward_cpu", &backward_cpu, WithoutGil());
#endif
#ifdef VITKERN_WITH_CUDA
  m.def("token_pool_forward_cuda", &forward_cuda, WithoutGil());
  m.def("token_pool_backward_cuda", &backward_cuda, WithoutGil());
  m.def("token_pool_workspace_cuda", &workspace_cuda);
#endif
}

}  // namespace vitkern::bindings::token_pool
