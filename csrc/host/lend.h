// SPDX-License-Identifier: Apache-2.0
// What a tensor lends: address, sizes, strides, type and device, without libtorch.
//
// Asked attribute by attribute, five tensors cost more than a small kernel. From 2.10 on, torch tells all at once through
// DLPack's C exchange API (github.com/dmlc/dlpack, 1.2), which knows no version of torch.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "host/function.h"

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

struct Lent : DLPackTensor {
  const void* address() const { return static_cast<const char*>(data) + byte_offset; }

  std::vector<int64_t> told;  // sizes and strides, where a function told them
};

// What the arguments of a call have lent, while it lasts, for those further down who ask the same ones in the same order.
class Lendings {
 public:
  static constexpr Py_ssize_t kMost = 8;

  explicit Lendings(PyObject* const* tensors) : tensors_(tensors), above_(innermost()) { innermost() = this; }
  ~Lendings() { innermost() = above_; }
  Lendings(const Lendings&) = delete;
  Lendings& operator=(const Lendings&) = delete;

  Lent& next() { return lent_[count_++]; }

  // What the tensor at this position has lent, or null.
  static const Lent* find(pybind11::handle tensor, Py_ssize_t position) {
    const Lendings* here = innermost();
    const bool known = here != nullptr && position < here->count_ && here->tensors_[position] == tensor.ptr();
    return known ? &here->lent_[position] : nullptr;
  }

 private:
  static Lendings*& innermost() {
    static thread_local Lendings* lendings = nullptr;
    return lendings;
  }

  PyObject* const* tensors_;
  Lendings* above_;
  Py_ssize_t count_ = 0;
  Lent lent_[kMost];
};

class Lender {
 public:
  // `source` is the capsule that holds the API; or, for older releases, a function of a tensor that returns address,
  // device type and index, type code and bits, sizes and strides, as DLPack counts them, or None.
  explicit Lender(const pybind11::object& source) : api_(nullptr), tell_(source) {
    if (!pybind11::isinstance<pybind11::capsule>(source)) return;
    api_ = pybind11::reinterpret_borrow<pybind11::capsule>(source).get_pointer<DLPackExchangeApi>();
    if (api_->major != 1 || api_->borrow == nullptr) throw std::runtime_error("DLPack: not version 1");
  }

  // Whether the tensor is one that lends. Asking takes as long as ten other things that a call does: see Lendings.
  bool operator()(pybind11::handle tensor, Lent& lent) const {
    if (api_ == nullptr) return ask(tensor, lent);
    if (api_->borrow(tensor.ptr(), &lent) == 0) return true;
    PyErr_Clear();
    return false;
  }

 private:
  bool ask(pybind11::handle tensor, Lent& lent) const {
    const pybind11::object answer =
        pybind11::reinterpret_steal<pybind11::object>(PyObject_CallOneArg(tell_.ptr(), tensor.ptr()));
    if (!answer) PyErr_Clear();  // of a plain type, but without memory
    if (!answer || answer.is_none()) return false;
    const auto [data, device_type, device_index, type_code, type_bits, shape, strides] =
        answer.cast<std::tuple<uintptr_t, int32_t, int32_t, uint8_t, uint8_t, std::vector<int64_t>,
                               std::vector<int64_t>>>();
    const auto dims = static_cast<int32_t>(shape.size());
    lent.told = shape;
    lent.told.insert(lent.told.end(), strides.begin(), strides.end());
    static_cast<DLPackTensor&>(lent) = {reinterpret_cast<void*>(data),
                                        device_type,
                                        device_index,
                                        dims,
                                        type_code,
                                        type_bits,
                                        1,
                                        lent.told.data(),
                                        lent.told.data() + dims,
                                        0};
    return true;
  }

  const DLPackExchangeApi* api_;
  pybind11::object tell_;
};

// The bytes that a tensor's storage has from the first element on. Its sizes promise nothing: a storage can be resized.
class Room {
 public:
  // `source` is a function of a tensor; or a pair of addresses, of aoti_torch_get_storage_size and
  // aoti_torch_get_storage_offset (torch/csrc/inductor/aoti_torch/c/shim.h), which make no Python object of the storage.
  Room(const pybind11::object& source, const pybind11::type& tensor)
      : ask_(source), handle_(tensor, "_cdata") {
    if (!pybind11::isinstance<pybind11::tuple>(source)) return;
    const auto [size, offset] = source.cast<std::pair<uintptr_t, uintptr_t>>();
    size_ = reinterpret_cast<Shim>(size);
    offset_ = reinterpret_cast<Shim>(offset);
  }

  // -1 if the tensor has no storage to ask.
  int64_t operator()(pybind11::handle tensor, int64_t element) const {
    const auto told = pybind11::reinterpret_steal<pybind11::object>(
        size_ == nullptr ? PyObject_CallOneArg(ask_.ptr(), tensor.ptr()) : handle_(tensor));
    if (!told) {
      PyErr_Clear();
      return -1;
    }
    if (size_ == nullptr) return PyLong_AsLongLong(told.ptr());
    void* const implementation = PyLong_AsVoidPtr(told.ptr());  // an at::Tensor is a pointer to it
    int64_t bytes = -1, offset = 0;
    if (size_(&implementation, &bytes) != 0 || offset_(&implementation, &offset) != 0) return -1;
    return bytes - offset * element;
  }

 private:
  using Shim = int32_t (*)(void* const* tensor, int64_t* answer);  // 0, or something went wrong

  pybind11::object ask_;
  Attribute handle_;
  Shim size_ = nullptr, offset_ = nullptr;
};

}  // namespace vitkern
