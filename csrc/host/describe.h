// SPDX-License-Identifier: Apache-2.0
// What has to be known of a call's tensors before it is known what to launch, in one bytes object: a key.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <utility>

#include "host/lend.h"

namespace vitkern {

class Describer {
 public:
  // The two exact types are those whose tensors are what memory holds.
  Describer(const pybind11::object& lends, const pybind11::object& room, pybind11::type tensor,
            pybind11::type parameter)
      : lender_(lends),
        room_(room, tensor),
        tensor_(std::move(tensor)),
        parameter_(std::move(parameter)),
        is_neg_(pybind11::getattr(tensor_, "is_neg")) {}

  // Types, devices, shapes and whether contiguous, of tensors and Nones; None if one is not what memory holds: of
  // another type, lazily negated or zero, sparse, or larger than its storage.
  pybind11::object operator()(const pybind11::tuple& tensors) const {
    std::string key = empty_key();
    for (const pybind11::handle tensor : tensors) {
      Lent lent{};
      if (!append(key, tensor, lent)) return pybind11::none();
    }
    return pybind11::bytes(key);
  }

  static std::string empty_key() {
    std::string key;
    key.reserve(512);  // more than most calls need, and one allocation
    return key;
  }

  const pybind11::type& tensor() const { return tensor_; }

  bool append(std::string& key, pybind11::handle tensor, Lent& lent) const {
    struct {  // without padding, which would be in the key
      int16_t dims = -1, device_type = 0, device_index = 0;
      uint8_t contiguous = 0, type_code = 0, type_bits = 0, unused = 0;
    } head;
    if (!tensor.is_none()) {
      const auto type = pybind11::type::handle_of(tensor);
      if (!type.is(tensor_) && !type.is(parameter_)) return false;
      if (!lender_(tensor, lent)) return false;
      int64_t count = 1, span = 1;  // elements, and how far they reach
      head.contiguous = 1;
      for (int32_t axis = lent.dims - 1; axis >= 0; --axis) {
        head.contiguous &= lent.shape[axis] == 1 || lent.strides[axis] == count;
        count *= lent.shape[axis];
        span += (lent.shape[axis] - 1) * lent.strides[axis];
      }
      // Lazily zero tensors have no memory; those that may be lazily negated are to be asked.
      const int64_t element = lent.type_bits / 8;
      if (count != 0 && (lent.data == nullptr || room_(tensor, element) < span * element)) return false;
      if (lent.type_code != kInteger && is_negated(tensor)) return false;
      if (count == 0) head.contiguous = 1;
      head.dims = static_cast<int16_t>(lent.dims);
      head.device_type = static_cast<int16_t>(lent.device_type);
      head.device_index = static_cast<int16_t>(lent.device_index);
      head.type_code = lent.type_code;
      head.type_bits = lent.type_bits;
    }
    key.append(reinterpret_cast<const char*>(&head), sizeof(head));
    if (head.dims > 0) key.append(reinterpret_cast<const char*>(lent.shape), head.dims * sizeof(int64_t));
    return true;
  }

 private:
  bool is_negated(pybind11::handle tensor) const {
    PyObject* const arguments[] = {tensor.ptr()};
    const auto answer = pybind11::reinterpret_steal<pybind11::object>(
        PyObject_Vectorcall(is_neg_.ptr(), arguments, 1, nullptr));
    if (!answer) throw pybind11::error_already_set();
    return answer.ptr() == Py_True;
  }

  Lender lender_;
  Room room_;
  pybind11::type tensor_, parameter_;
  pybind11::object is_neg_;
};

}  // namespace vitkern
