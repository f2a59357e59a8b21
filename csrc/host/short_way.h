// SPDX-License-Identifier: Apache-2.0
// The short way into an op's kernels (vitkern/ops/direct.py): from a call's arguments to the function that was planned
// for such ones, under an autograd.Function where a gradient is wanted.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <utility>
#include <vector>

#include "host/describe.h"
#include "host/function.h"

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

class ShortWay {
 public:
  // asks_gradients: torch.is_grad_enabled.
  // tensors: how many arguments are tensors or None; what follows are options, by default these.
  // recorded: positions of the tensors that may want a gradient.
  // plans: {(key of the tensors, *options): a tuple, or None: there is no short way}. The tuple begins with a function of
  // the tensors, and two that also record a gradient, of the recorded tensors and a tuple of all: one for the first
  // output, one for all of them.
  // whole: whether all outputs are returned, or the first.
  ShortWay(Describer describer, Watch watched, pybind11::object asks_gradients, Py_ssize_t tensors,
           pybind11::tuple defaults, std::vector<Py_ssize_t> recorded, pybind11::dict plans, bool whole)
      : describer_(std::move(describer)),
        watched_(std::move(watched)),
        asks_gradients_(std::move(asks_gradients)),
        tensors_(tensors),
        defaults_(std::move(defaults)),
        recorded_(std::move(recorded)),
        plans_(std::move(plans)),
        requires_grad_(describer_.tensor(), "requires_grad"),
        whole_(whole) {
    if (tensors > Lendings::kMost) throw std::invalid_argument("too many tensors for a short way");
  }

  // The op's result; None where the call has to go another way.
  pybind11::object operator()(Arguments inputs, Py_ssize_t count) const {
    if (count < tensors_ || count > tensors_ + static_cast<Py_ssize_t>(defaults_.size()) || watched_())
      return pybind11::none();
    Lendings lendings(inputs);
    const pybind11::object plan = find(inputs, count, lendings);
    if (!plan || plan.is_none()) return pybind11::none();
    if (wants_gradient(inputs)) return record(inputs, plan);
    pybind11::object outputs =
        checked(PyObject_Vectorcall(PyTuple_GET_ITEM(plan.ptr(), 0), inputs, tensors_, nullptr));
    if (whole_ || !PyTuple_CheckExact(outputs.ptr())) return outputs;
    return pybind11::reinterpret_borrow<pybind11::object>(PyTuple_GET_ITEM(outputs.ptr(), 0));
  }

 private:
  pybind11::object find(Arguments inputs, Py_ssize_t count, Lendings& lendings) const {
    std::string described = Describer::empty_key();
    for (Py_ssize_t position = 0; position < tensors_; ++position)
      if (!describer_.append(described, inputs[position], lendings.next())) return {};
    const auto options = static_cast<Py_ssize_t>(defaults_.size());
    const pybind11::tuple key(1 + options);
    PyTuple_SET_ITEM(key.ptr(), 0, pybind11::bytes(described).release().ptr());
    for (Py_ssize_t option = 0; option < options; ++option) {
      const bool given = tensors_ + option < count;
      PyObject* value = given ? inputs[tensors_ + option] : PyTuple_GET_ITEM(defaults_.ptr(), option);
      // The dispatcher has lists of numbers where functions have tuples.
      value = PyList_CheckExact(value) ? checked(PyList_AsTuple(value)).release().ptr() : Py_NewRef(value);
      PyTuple_SET_ITEM(key.ptr(), 1 + option, value);
    }
    PyObject* const found = PyDict_GetItemWithError(plans_.ptr(), key.ptr());
    if (found == nullptr) PyErr_Clear();  // an option that cannot be hashed has no plan either
    return pybind11::reinterpret_borrow<pybind11::object>(found);
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

  Describer describer_;
  Watch watched_;
  pybind11::object asks_gradients_;
  Py_ssize_t tensors_;
  pybind11::tuple defaults_;
  std::vector<Py_ssize_t> recorded_;
  pybind11::dict plans_;
  Attribute requires_grad_;
  bool whole_;
};

}  // namespace vitkern
