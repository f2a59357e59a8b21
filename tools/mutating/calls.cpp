// SPDX-License-Identifier: Apache-2.0
// The module _mutate_calls: collects the code objects that a thread calls. A profile function in Python would also see
// each call of C, and interpreted Triton kernels would take three times as long.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <unordered_set>

namespace {

std::unordered_set<PyCodeObject*> seen;  // keeps references; all accesses hold the GIL

int on_event(PyObject*, PyFrameObject* frame, int what, PyObject*) {
  if (what != PyTrace_CALL) return 0;
  PyCodeObject* code = PyFrame_GetCode(frame);
  if (!seen.insert(code).second) Py_DECREF(code);
  return 0;
}

// For the calling thread. It takes the arguments of a profile function, so that threading.setprofile() takes it.
PyObject* watch(PyObject*, PyObject*) {
  PyEval_SetProfile(on_event, nullptr);
  Py_RETURN_NONE;
}

PyObject* take(PyObject*, PyObject*) {
  PyObject* list = PyList_New(0);
  for (PyCodeObject* code : seen) {
    if (list != nullptr && PyList_Append(list, reinterpret_cast<PyObject*>(code)) != 0) Py_CLEAR(list);
    Py_DECREF(code);
  }
  seen.clear();
  return list;
}

PyMethodDef methods[] = {{"watch", watch, METH_VARARGS, "Collects the calls of this thread."},
                         {"take", take, METH_NOARGS, "The code objects so far, which are forgotten."},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_mutate_calls", nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit__mutate_calls() { return PyModule_Create(&module); }
