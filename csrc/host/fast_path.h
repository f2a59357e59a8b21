// SPDX-License-Identifier: Apache-2.0
// The fast path into an op's kernels (vitkern/ops/fast_path.py): from a call's arguments to the plan of their signature,
// under an autograd.Function if a gradient is needed.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "host/function.h"
#include "host/signature.h"

namespace vitkern {

// Whether the dispatcher is to see a call.
class Watch {
 public:
  // watchers: functions without arguments; a true answer of any means yes.
  // forward_ad: the variables of torch.autograd.forward_ad, whose level is -1 outside of any.
  Watch(pybind11::tuple watchers, pybind11::dict forward_ad)
      : watchers_(std::move(watchers)), forward_ad_(std::move(forward_ad)), level_("_current_level") {}

  bool operator()() const {
    for (const pybind11::handle watcher : watchers_)
      if (is_true(checked(PyObject_CallNoArgs(watcher.ptr())))) return true;
    PyObject* const level = PyDict_GetItemWithError(forward_ad_.ptr(), level_.ptr());
    return level != nullptr && PyLong_AsLong(level) >= 0;
  }

 private:
  pybind11::tuple watchers_;
  pybind11::dict forward_ad_;
  pybind11::str level_;
};

class FastPath {
 public:
  // asks_gradients: torch.is_grad_enabled.
  // tensors: how many arguments are tensors or None; what follows are options, by default these.
  // recorded: positions of the tensors that may need a gradient.
  // plans: {(key of the tensors, *options): a tuple, or None: there is no fast path}. The tuple begins with a function of
  // the tensors, and two that also record a gradient, of the recorded tensors and a tuple of all: one for the first
  // output, one for all of them.
  // whole: whether all outputs are returned, or the first.
  FastPath(Signer signer, Watch watched, pybind11::object asks_gradients, Py_ssize_t tensors,
           pybind11::tuple defaults, std::vector<Py_ssize_t> recorded, pybind11::dict plans, bool whole)
      : signer_(std::move(signer)),
        watched_(std::move(watched)),
        asks_gradients_(std::move(asks_gradients)),
        tensors_(tensors),
        defaults_(std::move(defaults)),
        recorded_(std::move(recorded)),
        plans_(std::move(plans)),
        requires_grad_(signer_.tensor(), "requires_grad"),
        whole_(whole) {
    if (tensors > TensorView::kMost) throw std::invalid_argument("an op has too many tensors");
  }

  // The op's result; None where the call has to go another way.
  pybind11::object operator()(Arguments inputs, Py_ssize_t count, const TensorView*) const {
    if (count < tensors_ || count > tensors_ + static_cast<Py_ssize_t>(defaults_.size()) || watched_())
      return pybind11::none();
    TensorView views[TensorView::kMost];
    const pybind11::object plan = find(inputs, count, views);
    if (!plan || plan.is_none()) return pybind11::none();
    if (wants_gradient(inputs)) return record(inputs, plan);
    pybind11::object outputs = call(PyTuple_GET_ITEM(plan.ptr(), 0), inputs, tensors_, views);
    if (whole_ || !PyTuple_CheckExact(outputs.ptr())) return outputs;
    return pybind11::reinterpret_borrow<pybind11::object>(PyTuple_GET_ITEM(outputs.ptr(), 0));
  }

 private:
  // A tensor's methods may let another thread run: nothing that outlives a call is written while it is signed.
  pybind11::object find(Arguments inputs, Py_ssize_t count, TensorView* views) const {
    std::string signature;
    signature.reserve(512);  // more than most calls need, and one allocation
    for (Py_ssize_t position = 0; position < tensors_; ++position)
      if (!signer_.append(signature, inputs[position], views[position])) return {};
    if (!is_last(signature, inputs, count)) last_ = key_of(signature, inputs, count);
    const pybind11::object key = last_;
    PyObject* const found = PyDict_GetItemWithError(plans_.ptr(), key.ptr());
    if (found == nullptr) PyErr_Clear();  // an option that cannot be hashed has no plan either
    return pybind11::reinterpret_borrow<pybind11::object>(found);
  }

  PyObject* option(Arguments inputs, Py_ssize_t count, Py_ssize_t index) const {
    return tensors_ + index < count ? inputs[tensors_ + index] : PyTuple_GET_ITEM(defaults_.ptr(), index);
  }

  // Whether the key is that of the last call: to hash it anew costs as much as a tensor.
  bool is_last(const std::string& signature, Arguments inputs, Py_ssize_t count) const {
    if (!last_) return false;
    PyObject* const known = PyTuple_GET_ITEM(last_.ptr(), 0);
    if (PyBytes_GET_SIZE(known) != static_cast<Py_ssize_t>(signature.size()) ||
        std::memcmp(PyBytes_AS_STRING(known), signature.data(), signature.size()) != 0)
      return false;
    for (Py_ssize_t index = 0; index < static_cast<Py_ssize_t>(defaults_.size()); ++index)
      if (option(inputs, count, index) != PyTuple_GET_ITEM(last_.ptr(), 1 + index)) return false;
    return true;
  }

  pybind11::tuple key_of(const std::string& signature, Arguments inputs, Py_ssize_t count) const {
    const auto options = static_cast<Py_ssize_t>(defaults_.size());
    pybind11::tuple key(1 + options);
    PyTuple_SET_ITEM(key.ptr(), 0, pybind11::bytes(signature).release().ptr());
    for (Py_ssize_t index = 0; index < options; ++index) {
      PyObject* const value = option(inputs, count, index);
      // The dispatcher has lists of numbers where functions have tuples.
      PyTuple_SET_ITEM(
          key.ptr(), 1 + index,
          PyList_CheckExact(value) ? checked(PyList_AsTuple(value)).release().ptr() : Py_NewRef(value));
    }
    return key;
  }

  bool wants_gradient(Arguments inputs) const {
    for (const Py_ssize_t position : recorded_)
      if (inputs[position] != Py_None && is_true(checked(requires_grad_(inputs[position]))))
        return is_true(checked(PyObject_CallNoArgs(asks_gradients_.ptr())));
    return false;
  }

  pybind11::object record(Arguments inputs, const pybind11::object& plan) const {
    const pybind11::tuple tensors(tensors_);
    for (Py_ssize_t position = 0; position < tensors_; ++position)
      PyTuple_SET_ITEM(tensors.ptr(), position, Py_NewRef(inputs[position]));
    std::vector<PyObject*> arguments;
    arguments.reserve(recorded_.size() + 1);
    for (const Py_ssize_t position : recorded_) arguments.push_back(inputs[position]);
    arguments.push_back(tensors.ptr());
    PyObject* const apply = PyTuple_GET_ITEM(plan.ptr(), whole_ ? 2 : 1);
    return checked(PyObject_Vectorcall(apply, arguments.data(), arguments.size(), nullptr));
  }

  Signer signer_;
  Watch watched_;
  pybind11::object asks_gradients_;
  Py_ssize_t tensors_;
  pybind11::tuple defaults_;
  std::vector<Py_ssize_t> recorded_;
  pybind11::dict plans_;
  Attribute requires_grad_;
  bool whole_;
  mutable pybind11::object last_;  // key of the last call, guarded by the GIL
};

// The same for a backward pass: from grad_output and the saved tensors to the kernel of the plan that recorded them.
class FastBackward {
 public:
  // signatures: of grad_output and the tensors, those for which the kernel may run. kernel: of the needed gradients, a
  // contiguous grad_output, and the tensors.
  FastBackward(Signer signer, Watch watched, pybind11::object asks_gradients,
               std::vector<std::string> signatures, pybind11::object kernel)
      : signer_(std::move(signer)),
        watched_(std::move(watched)),
        asks_gradients_(std::move(asks_gradients)),
        signatures_(std::move(signatures)),
        kernel_(std::move(kernel)),
        contiguous_("contiguous") {}

  // Takes the flags of the needed gradients, grad_output and the tensors; returns the gradients, or None where the call
  // takes the dispatcher's path, as gradients of gradients do: the op refuses them in words.
  pybind11::object operator()(Arguments inputs, Py_ssize_t count, const TensorView*) const {
    if (count < 2 || count - 1 > TensorView::kMost ||
        is_true(checked(PyObject_CallNoArgs(asks_gradients_.ptr()))) || watched_())
      return pybind11::none();
    std::string signature;
    signature.reserve(512);
    TensorView views[TensorView::kMost];
    for (Py_ssize_t position = 1; position < count; ++position)
      if (!signer_.append(signature, inputs[position], views[position - 1])) return pybind11::none();
    if (std::find(signatures_.begin(), signatures_.end(), signature) == signatures_.end())
      return pybind11::none();
    const auto gradient = checked(PyObject_CallMethodNoArgs(inputs[1], contiguous_.ptr()));
    std::vector<PyObject*> arguments(inputs, inputs + count);
    arguments[1] = gradient.ptr();
    const bool borrowed = gradient.ptr() == inputs[1];
    return call(kernel_.ptr(), arguments.data(), count, borrowed ? views : nullptr);
  }

 private:
  Signer signer_;
  Watch watched_;
  pybind11::object asks_gradients_;
  std::vector<std::string> signatures_;
  pybind11::object kernel_;
  pybind11::str contiguous_;
};

}  // namespace vitkern
