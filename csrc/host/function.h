// SPDX-License-Identifier: Apache-2.0
// A C++ function as a Python function of positional arguments, as fast as a builtin: pybind11's own call costs several
// times as much, which is too slow for small kernels.
#pragma once

#include <pybind11/pybind11.h>

#include <exception>
#include <functional>
#include <stdexcept>
#include <utility>

namespace vitkern {

struct TensorView;

using Arguments = PyObject* const*;
// Takes the arguments, their number, and views of the tensors among them, if the caller has borrowed those already.
using Positional = std::function<pybind11::object(Arguments, Py_ssize_t, const TensorView*)>;

inline PyObject* call_positional(PyObject* self, Arguments arguments, Py_ssize_t count) {
  try {
    return (*static_cast<Positional*>(PyCapsule_GetPointer(self, nullptr)))(arguments, count, nullptr)
        .release()
        .ptr();
  } catch (pybind11::error_already_set& error) {
    error.restore();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

inline pybind11::object make_function(Positional function) {
  static PyMethodDef definition = {"call", reinterpret_cast<PyCFunction>(&call_positional), METH_FASTCALL,
                                   nullptr};
  const pybind11::capsule self(new Positional(std::move(function)),
                               [](void* address) { delete static_cast<Positional*>(address); });
  return pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&definition, self.ptr()));
}

// The result of a Python call, or the exception that it raised.
inline pybind11::object checked(PyObject* result) {
  if (result == nullptr) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(result);
}

// Calls a function. One that make_function() made gets the views.
inline pybind11::object call(PyObject* function, Arguments arguments, Py_ssize_t count,
                             const TensorView* views) {
  if (!PyCFunction_Check(function) ||
      PyCFunction_GET_FUNCTION(function) != reinterpret_cast<PyCFunction>(&call_positional))
    return checked(PyObject_Vectorcall(function, arguments, count, nullptr));
  PyObject* const self = PyCFunction_GET_SELF(function);
  return (*static_cast<Positional*>(PyCapsule_GetPointer(self, nullptr)))(arguments, count, views);
}

// An attribute that a type written in C computes, read without looking its name up.
class Attribute {
 public:
  Attribute(const pybind11::type& type, const char* name)
      : name_(pybind11::reinterpret_steal<pybind11::str>(PyUnicode_InternFromString(name))) {
    const auto descriptor = pybind11::getattr(type, name, pybind11::none());
    if (PyObject_TypeCheck(descriptor.ptr(), &PyGetSetDescr_Type))
      definition_ = reinterpret_cast<PyGetSetDescrObject*>(descriptor.ptr())->d_getset;
  }

  // Null, and a Python error, where the object has none.
  PyObject* operator()(pybind11::handle object) const {
    if (definition_ != nullptr) return definition_->get(object.ptr(), definition_->closure);
    return PyObject_GetAttr(object.ptr(), name_.ptr());
  }

 private:
  pybind11::str name_;
  const PyGetSetDef* definition_ = nullptr;
};

inline bool is_true(pybind11::handle object) {
  if (object.is_none() || object.ptr() == Py_False) return false;
  const int truth = PyObject_IsTrue(object.ptr());
  if (truth < 0) throw pybind11::error_already_set();
  return truth != 0;
}

}  // namespace vitkern
