// SPDX-License-Identifier: Apache-2.0
// token_pool in vitkern._C: fills the kernel's parameters from tensors.
#pragma once

#include "host/call.h"
#include "token_pool/cpu.h"
#include "token_pool/params.h"
#ifdef VITKERN_WITH_CUDA
#include "token_pool/cuda.h"
#endif

namespace vitkern::bindings::token_pool {

inline void read_inputs(TokenPoolParams& p, const TensorView& x, const TensorView& weight) {
  p.batch = x.size(0);
  p.pixels = x.size(1);
  p.channels = x.size(2);
  p.tokens = weight.size(-2);
  p.weight_per_image = weight.dims == 3;
  p.dtype = x.dtype();
  p.x = x.address();
  p.weight = weight.address();
}

inline void read_forward(TokenPoolParams& p, const TensorView* in, const TensorView* out) {
  read_inputs(p, in[0], in[1]);
  p.output = out[0].address();
  p.statistics = out[1].address();
}

inline void read_backward(TokenPoolParams& p, const TensorView* in, const TensorView* out) {
  p.grad_output = in[0].address();
  read_inputs(p, in[1], in[2]);
  p.pooled = in[3].address();
  p.statistics = in[4].address();
  p.grad_x = out[0].address();
  p.grad_weight = out[1].address();
}

inline const Pass<TokenPoolParams> kForward{"token_pool",
                                            2,
                                            2,
                                            read_forward,
                                            token_pool_forward_cpu,
                                            VITKERN_CUDA(token_pool_forward_cuda),
                                            VITKERN_CUDA(token_pool_forward_workspace_cuda)};
inline const Pass<TokenPoolParams> kBackward{"token_pool",
                                             5,
                                             2,
                                             read_backward,
                                             token_pool_backward_cpu,
                                             VITKERN_CUDA(token_pool_backward_cuda),
                                             VITKERN_CUDA(token_pool_backward_workspace_cuda),
                                             true};

inline void bind(pybind11::class_<Host>& host) {
  host.def("token_pool_forward", [](const Host& host, const pybind11::iterable& outputs) {
    return make_call(kForward, host, {}, outputs);
  });
  host.def("token_pool_backward", [](const Host& host, const pybind11::iterable& gradients) {
    return make_call(kBackward, host, {}, gradients);
  });
}

}  // namespace vitkern::bindings::token_pool
