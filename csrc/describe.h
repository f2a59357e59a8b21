// SPDX-License-Identifier: Apache-2.0
// What has to be known of a call's tensors before it is known what to launch, in one bytes object: a key.
//
// Asked attribute by attribute, five tensors cost more than a small kernel. Sizes, strides, type and device come
// through DLPack's C exchange API instead (github.com/dmlc/dlpack, 1.2), which knows no version of torch.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace vitkern {

struct DLPackTensor {
  void* data;
  int32_t device_type, device_index;
  int32_t dims;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

constexpr uint8_t kInteger = 0;  // a type_code

struct DLPackExchangeApi {
  uint32_t major, minor;
  void *previous, *allocate, *from_python, *to_python;
  int (*borrow)(void* object, DLPackTensor* tensor);  // 0, or a Python error is set
  void* stream;
};

class Describer {
 public:
  // The capsule that holds the API, and the two exact types whose tensors are what memory holds.
  Describer(const pybind11::capsule& api, pybind11::type tensor, pybind11::type parameter)
      : api_(api.get_pointer<DLPackExchangeApi>()),
        tensor_(std::move(tensor)),
        parameter_(std::move(parameter)),
        is_neg_("is_neg") {
    if (api_->major != 1 || api_->borrow == nullptr) throw std::runtime_error("DLPack: not version 1");
  }

  // Types, devices, shapes and whether contiguous, of tensors and Nones; None if one is not what memory holds.
  pybind11::object operator()(const pybind11::tuple& tensors) const {
    std::string key;
    for (const pybind11::handle tensor : tensors)
      if (!append(key, tensor)) return pybind11::none();
    return pybind11::bytes(key);
  }

 private:
  bool append(std::string& key, pybind11::handle tensor) const {
    struct {
      int32_t dims = -1, device_type = 0, device_index = 0, contiguous = 0, type = 0;
    } head;
    DLPackTensor borrowed{};
    if (!tensor.is_none()) {
      const auto type = pybind11::type::handle_of(tensor);
      if (!type.is(tensor_) && !type.is(parameter_)) return false;
      if (api_->borrow(tensor.ptr(), &borrowed) != 0) {
        PyErr_Clear();
        return false;
      }
      int64_t count = 1;
      head.contiguous = 1;
      for (int32_t axis = borrowed.dims - 1; axis >= 0; --axis) {
        head.contiguous &= borrowed.shape[axis] == 1 || borrowed.strides[axis] == count;
        count *= borrowed.shape[axis];
      }
      // Lazily zero tensors have no memory; those that may be lazily negated are to be asked.
      if (count != 0 && borrowed.data == nullptr) return false;
      if (borrowed.type_code != kInteger && is_negated(tensor)) return false;
      if (count == 0) head.contiguous = 1;
      head.dims = borrowed.dims;
      head.device_type = borrowed.device_type;
      head.device_index = borrowed.device_index;
      head.type = borrowed.type_code << 16 | borrowed.type_bits;
    }
    key.append(reinterpret_cast<const char*>(&head), sizeof(head));
    if (head.dims > 0) key.append(reinterpret_cast<const char*>(borrowed.shape), head.dims * sizeof(int64_t));
    return true;
  }

  bool is_negated(pybind11::handle tensor) const {
    const auto answer =
        pybind11::reinterpret_steal<pybind11::object>(PyObject_CallMethodNoArgs(tensor.ptr(), is_neg_.ptr()));
    if (!answer) throw pybind11::error_already_set();
    return answer.ptr() == Py_True;
  }

  const DLPackExchangeApi* api_;
  pybind11::type tensor_, parameter_;
  pybind11::str is_neg_;
};

}  // namespace vitkern
