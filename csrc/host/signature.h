// SPDX-License-Identifier: Apache-2.0
// The signature of a call's tensors, as bytes: types, devices, shapes and contiguity. It is the key of a plan, and the
// proof that each tensor lies within its storage.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <utility>

#include "host/tensor.h"

namespace vitkern {

class Signer {
 public:
  // Tensors of the two exact types are what memory holds; those of subclasses may be anything.
  Signer(const pybind11::object& borrow, const pybind11::object& room, pybind11::type tensor,
         pybind11::type parameter)
      : borrow_(borrow),
        room_(room, tensor),
        tensor_(std::move(tensor)),
        parameter_(std::move(parameter)),
        is_neg_(pybind11::getattr(tensor_, "is_neg")) {}

  // Takes tensors and Nones. Returns None if a tensor does not simply view its memory: if it has another type, is
  // lazily negated or zero, sparse, or larger than its storage.
  pybind11::object operator()(const pybind11::tuple& tensors) const {
    std::string key;
    TensorView view;
    for (const pybind11::handle tensor : tensors)
      if (!append(key, tensor, view)) return pybind11::none();
    return pybind11::bytes(key);
  }

  const pybind11::type& tensor() const { return tensor_; }

  // The view is of the tensor afterwards; that of None has no memory and no axes.
  bool append(std::string& key, pybind11::handle tensor, TensorView& view) const {
    struct {  // without padding, which would be in the key
      int16_t dims = -1, device_type = 0, device_index = 0;
      uint8_t contiguous = 0, type_code = 0, type_bits = 0, unused = 0;
    } head;
    if (tensor.is_none()) {
      static_cast<DLPackTensor&>(view) = {};
    } else {
      const auto type = pybind11::type::handle_of(tensor);
      if (!type.is(tensor_) && !type.is(parameter_)) return false;
      if (!borrow_(tensor, view)) return false;
      const int64_t span = view.span();
      // Lazily zero tensors have no memory; those that may be lazily negated are asked.
      if (span != 0 && (view.data == nullptr || room_(tensor, view.type_bits / 8) < span)) return false;
      if (view.type_code != kInteger && is_negated(tensor)) return false;
      head.contiguous = view.is_contiguous();
      head.dims = static_cast<int16_t>(view.dims);
      head.device_type = static_cast<int16_t>(view.device_type);
      head.device_index = static_cast<int16_t>(view.device_index);
      head.type_code = view.type_code;
      head.type_bits = view.type_bits;
    }
    key.append(reinterpret_cast<const char*>(&head), sizeof(head));
    if (head.dims > 0) key.append(reinterpret_cast<const char*>(view.shape), head.dims * sizeof(int64_t));
    return true;
  }

 private:
  bool is_negated(pybind11::handle tensor) const {
    return checked(PyObject_CallOneArg(is_neg_.ptr(), tensor.ptr())).ptr() == Py_True;
  }

  Borrower borrow_;
  Room room_;
  pybind11::type tensor_, parameter_;
  pybind11::object is_neg_;
};

}  // namespace vitkern
