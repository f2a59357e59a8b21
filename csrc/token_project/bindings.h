// SPDX-License-Identifier: Apache-2.0
// token_project in vitkern._C: fills the kernel's parameters from tensors.
#pragma once

#include "host/call.h"
#include "token_project/cpu.h"
#include "token_project/params.h"
#ifdef VITKERN_WITH_CUDA
#include "token_project/cuda.h"
#endif

namespace vitkern::bindings::token_project {

inline void read_inputs(TokenProjectParams& p, const TensorView& query, const TensorView& key,
                        const TensorView& tokens) {
  p.batch = query.size(0);
  p.pixels = query.size(1);
  p.keys = query.size(2);
  p.token_count = tokens.size(1);
  p.channels = tokens.size(2);
  p.dtype = query.dtype();
  p.query = query.address();
  p.key = key.address();
  p.tokens = tokens.address();
}

inline void read_forward(TokenProjectParams& p, const TensorView* in, const TensorView* out) {
  read_inputs(p, in[1], in[2], in[3]);
  p.x = in[0].address();
  p.output = out[0].address();
}

// x is None, not saved: no gradient depends on its values.
inline void read_backward(TokenProjectParams& p, const TensorView* in, const TensorView* out) {
  p.grad_output = in[0].address();
  read_inputs(p, in[2], in[3], in[4]);
  p.grad_query = out[0].address();
  p.grad_key = out[1].address();
  p.grad_tokens = out[2].address();
}

inline const Pass<TokenProjectParams> kForward{
    "token_project", 4, 1, read_forward, token_project_forward_cpu, VITKERN_CUDA(token_project_forward_cuda)};
inline const Pass<TokenProjectParams> kBackward{"token_project",
                                                5,
                                                3,
                                                read_backward,
                                                token_project_backward_cpu,
                                                VITKERN_CUDA(token_project_backward_cuda),
                                                VITKERN_CUDA(token_project_workspace_cuda),
                                                true};

inline void bind(pybind11::class_<Host>& host) {
  host.def("token_project_forward", [](const Host& host, const pybind11::iterable& outputs) {
    return make_call(kForward, host, {}, outputs);
  });
  host.def("token_project_backward", [](const Host& host, const pybind11::iterable& gradients) {
    return make_call(kBackward, host, {}, gradients);
  });
}

}  // namespace vitkern::bindings::token_project
