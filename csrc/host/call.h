// SPDX-License-Identifier: Apache-2.0
// The hand-over from Python to the kernels, the same for every op, pass and device: tensors come in, parameters go out.
//
// An op's tensors fill its parameters by name (<op>/bindings.h). Call allocates the outputs, borrows all tensors, sets
// device and stream, and launches without the GIL.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/cpu_isa.h"
#include "host/function.h"
#include "host/tensor.h"

namespace vitkern {

// Where the calls of a plan run.
struct Host {
  // cuda: the CUDA kernels, else those of the CPU. borrow: see Borrower. device: ordinal of a GPU. where: a function that
  // gives the number of threads, or the current stream. workspace: a function that allocates bytes on the device of a
  // tensor: workspace(tensor, bytes).
  Host(bool cuda, const pybind11::object& borrow, int device, pybind11::object where,
       pybind11::object workspace)
      : cuda(cuda),
        borrow(borrow),
        device(device),
        where(std::move(where)),
        workspace(std::move(workspace)) {}

  bool cuda;
  Borrower borrow;
  int device;
  pybind11::object where, workspace;
};

// An output for Call to allocate: its sizes, its dtype (None: that of the first tensor), and whether it is zeros.
struct Output {
  explicit Output(const pybind11::tuple& spec)
      : dtype(spec[1]), zeros(spec.size() > 2 && spec[2].cast<bool>()) {
    for (const pybind11::handle size : spec[0])
      arguments.push_back(pybind11::reinterpret_borrow<pybind11::object>(size));
    if (arguments.empty()) arguments.push_back(pybind11::tuple());
    if (!dtype.is_none()) arguments.push_back(dtype);
  }

  pybind11::object dtype;
  bool zeros;
  std::vector<pybind11::object>
      arguments;  // of new_empty or new_zeros: sizes one by one are read faster than a tuple
};

#ifdef VITKERN_WITH_CUDA
#define VITKERN_CUDA(FUNCTION) FUNCTION
#else
#define VITKERN_CUDA(FUNCTION) nullptr
#endif

// One pass of an op.
template <typename Params>
struct Pass {
  using Launch = void (*)(const Params&);

  const char* op;
  Py_ssize_t inputs, outputs;
  void (*read)(Params&, const TensorView* inputs,
               const TensorView* outputs);  // fills the parameters, by name
  CpuKernel<Params> cpu;
  Launch cuda;                                    // null where a build has none
  int64_t (*workspace)(const Params&) = nullptr;  // cuda: bytes, into params.workspace
  bool backward = false;  // then the first argument says which outputs are needed, and others are null
};

template <typename Params>
class Call {
 public:
  // options: the parameters that are the same in all calls.
  Call(const Pass<Params>& pass, Host host, const Params& options, const pybind11::iterable& outputs)
      : pass_(pass),
        host_(std::move(host)),
        options_(options),
        new_empty_("new_empty"),
        new_zeros_("new_zeros"),
        keywords_(pybind11::make_tuple("dtype")) {
    for (const pybind11::handle output : outputs)
      outputs_.emplace_back(pybind11::reinterpret_borrow<pybind11::tuple>(output));
    if (static_cast<Py_ssize_t>(outputs_.size()) != pass.outputs)
      throw std::invalid_argument(std::string(pass.op) + ": a wrong number of outputs");
    if (host_.cuda ? pass.cuda == nullptr : !pass.cpu)
      throw std::invalid_argument(std::string(pass.op) + ": not in this build");
    options_.device = host_.device;
  }

  // Takes the tensors, None for those left out; returns the output, or a tuple of outputs.
  // borrowed: views of the tensors, if the caller has them.
  pybind11::object operator()(Arguments arguments, Py_ssize_t count, const TensorView* borrowed) const {
    PyObject* const wanted = pass_.backward && count > 0 ? arguments[0] : nullptr;
    if (count != pass_.inputs + pass_.backward ||
        (wanted != nullptr && (!PyTuple_CheckExact(wanted) || PyTuple_GET_SIZE(wanted) != pass_.outputs)))
      throw std::invalid_argument(std::string(pass_.op) + ": a wrong number of arguments");
    PyObject* const* const tensors = arguments + pass_.backward;

    TensorView inputs[TensorView::kMost], results[TensorView::kMost];
    if (borrowed == nullptr) {
      for (Py_ssize_t i = 0; i < pass_.inputs; ++i) borrow(tensors[i], inputs[i]);
      borrowed = inputs;
    }
    const pybind11::tuple outputs = allocate(wanted, tensors[0], results);
    Params params = options_;
    pass_.read(params, borrowed, results);
    const pybind11::object workspace = aim(params, tensors[0]);
    {
      const pybind11::gil_scoped_release released;
      if (host_.cuda) pass_.cuda(params);
#ifndef VITKERN_EMULATED
      if (!host_.cuda) pass_.cpu(params);
#endif
    }
    if (pass_.backward || pass_.outputs != 1) return outputs;
    return outputs[0];
  }

 private:
  void borrow(pybind11::handle tensor, TensorView& view) const {
    if (tensor.is_none()) {
      static_cast<DLPackTensor&>(view) = {};
      return;
    }
    if (!host_.borrow(tensor, view))
      throw std::invalid_argument(std::string(pass_.op) + ": a tensor without memory of its own");
    if (!view.is_contiguous()) throw std::invalid_argument(std::string(pass_.op) + ": a strided tensor");
  }

  // The outputs, None for those that are not wanted.
  pybind11::tuple allocate(PyObject* wanted, PyObject* like, TensorView* views) const {
    pybind11::tuple outputs(pass_.outputs);
    for (Py_ssize_t i = 0; i < pass_.outputs; ++i) {
      const bool left_out = wanted != nullptr && !is_true(PyTuple_GET_ITEM(wanted, i));
      pybind11::object output = left_out ? pybind11::none() : allocate(outputs_[i], like);
      borrow(output, views[i]);
      PyTuple_SET_ITEM(outputs.ptr(), i, output.release().ptr());
    }
    return outputs;
  }

  pybind11::object allocate(const Output& output, PyObject* like) const {
    PyObject* arguments[2 + TensorView::kMostDims] = {like};
    size_t count = 1;
    for (const pybind11::object& argument : output.arguments) arguments[count++] = argument.ptr();
    const bool named = !output.dtype.is_none();
    return checked(PyObject_VectorcallMethod((output.zeros ? new_zeros_ : new_empty_).ptr(), arguments,
                                             count - named, named ? keywords_.ptr() : nullptr));
  }

  // Tells the parameters where to run; returns the workspace for as long as the call lasts.
  pybind11::object aim(Params& params, PyObject* like) const {
    const auto where = checked(PyObject_CallNoArgs(host_.where.ptr()));
    if (!host_.cuda) {
      params.threads = static_cast<int32_t>(PyLong_AsLong(where.ptr()));
      return {};
    }
    params.stream = PyLong_AsVoidPtr(where.ptr());
    if (pass_.workspace == nullptr) return {};
    pybind11::object memory = host_.workspace(pybind11::handle(like), pass_.workspace(params));
    TensorView view;
    borrow(memory, view);
    params.workspace = view.address();
    return memory;
  }

  Pass<Params> pass_;
  Host host_;
  Params options_;
  std::vector<Output> outputs_;
  pybind11::str new_empty_, new_zeros_;
  pybind11::tuple keywords_;
};

// The pass as a Python function.
template <typename Params>
pybind11::object make_call(const Pass<Params>& pass, const Host& host, const Params& options,
                           const pybind11::iterable& outputs) {
  return make_function(Call<Params>(pass, host, options, outputs));
}

}  // namespace vitkern
