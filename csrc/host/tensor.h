// SPDX-License-Identifier: Apache-2.0
// A tensor as C++ sees it: address, sizes, strides, type and device, without libtorch.
//
// From 2.10 on, torch provides all of it at once through DLPack's C exchange API (github.com/dmlc/dlpack, 1.2), which
// does not depend on torch's version. For older releases, a Python function reads it.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "common/dtype.h"
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

constexpr uint8_t kInteger = 0, kBFloat = 4;  // type codes
constexpr int32_t kCpu = 1;                   // a device type

struct DLPackExchangeApi {
  uint32_t major, minor;
  void *previous, *allocate, *from_python, *to_python;
  int (*borrow)(void* object, DLPackTensor* tensor);  // 0, or a Python error is set
  void* stream;
};

// A borrowed tensor; without memory and axes where the argument is None.
struct TensorView : DLPackTensor {
  static constexpr int32_t kMostDims = 8;  // of an op's arguments
  static constexpr Py_ssize_t kMost = 12;  // tensors of a call, and outputs of a call

  void* address() const { return static_cast<char*>(data) + byte_offset; }

  template <typename T>
  T* as() const {
    return static_cast<T*>(address());
  }

  // Sizes by axis; negative axes count from the last.
  int64_t size(int32_t axis) const { return shape[axis < 0 ? axis + dims : axis]; }

  // How many rows, all axes but the last together.
  int64_t rows() const {
    int64_t count = 1;
    for (int32_t axis = 0; axis < dims - 1; ++axis) count *= shape[axis];
    return count;
  }

  bool is_contiguous() const {
    int64_t count = 1, step = 1;
    for (int32_t axis = dims - 1; axis >= 0; --axis) {
      if (shape[axis] != 1 && strides[axis] != step) count = -1;
      if (shape[axis] == 0) return true;
      step *= shape[axis];
    }
    return count == 1;
  }

  // Bytes from the first element to the end of the last; 0 without elements.
  int64_t span() const {
    int64_t last = 0;
    for (int32_t axis = 0; axis < dims; ++axis) {
      if (shape[axis] == 0) return 0;
      last += (shape[axis] - 1) * strides[axis];
    }
    return (last + 1) * (type_bits / 8);
  }

  DType dtype() const {
    if (type_code == kBFloat) return DType::kBFloat16;
    return type_bits == 16 ? DType::kFloat16 : type_bits == 32 ? DType::kFloat32 : DType::kFloat64;
  }

  int64_t told[2 * kMostDims];  // sizes and strides, where a Python function told them
};

// Borrows tensors.
class Borrower {
 public:
  // `source` is the capsule of the API; or, for older releases, a function of a tensor that returns address, device type
  // and index, type code and bits, sizes and strides, as DLPack counts them, or None.
  explicit Borrower(const pybind11::object& source) : api_(nullptr), tell_(source) {
    if (!pybind11::isinstance<pybind11::capsule>(source)) return;
    api_ = pybind11::reinterpret_borrow<pybind11::capsule>(source).get_pointer<DLPackExchangeApi>();
    if (api_->major != 1 || api_->borrow == nullptr) throw std::runtime_error("DLPack: not version 1");
  }

  // False if the tensor has no memory of its own.
  bool operator()(pybind11::handle tensor, TensorView& view) const {
    if (api_ == nullptr) return ask(tensor, view);
    if (api_->borrow(tensor.ptr(), &view) == 0) return true;
    PyErr_Clear();
    return false;
  }

 private:
  bool ask(pybind11::handle tensor, TensorView& view) const {
    const auto answer =
        pybind11::reinterpret_steal<pybind11::object>(PyObject_CallOneArg(tell_.ptr(), tensor.ptr()));
    if (!answer) PyErr_Clear();
    if (!answer || answer.is_none()) return false;
    const auto [data, device_type, device_index, type_code, type_bits, shape, strides] =
        answer.cast<std::tuple<uintptr_t, int32_t, int32_t, uint8_t, uint8_t, std::vector<int64_t>,
                               std::vector<int64_t>>>();
    const auto dims = static_cast<int32_t>(shape.size());
    if (dims > TensorView::kMostDims) return false;
    std::copy(shape.begin(), shape.end(), view.told);
    std::copy(strides.begin(), strides.end(), view.told + dims);
    static_cast<DLPackTensor&>(view) = {reinterpret_cast<void*>(data),
                                        device_type,
                                        device_index,
                                        dims,
                                        type_code,
                                        type_bits,
                                        1,
                                        view.told,
                                        view.told + dims,
                                        0};
    return true;
  }

  const DLPackExchangeApi* api_;
  pybind11::object tell_;
};

// Bytes of a tensor's storage from its first element on. Sizes alone prove nothing: a storage can be resized.
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

  // -1 if the tensor has no storage.
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
