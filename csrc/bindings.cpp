// SPDX-License-Identifier: Apache-2.0
// The module vitkern._C. Each op has its bindings beside its kernels; all are compiled in this file, because including
// pybind11 takes longer than compiling them.
#include "adapter_bottleneck/bindings.h"
#include "common/cpu_isa.h"
#include "common/cuda_driver.h"
#include "host/call.h"
#include "host/fast_path.h"
#include "ms_deform_attn/bindings.h"
#include "token_pool/bindings.h"
#include "token_project/bindings.h"

namespace py = pybind11;

// VITKERN_MODULE is _C, or _emulated where the CUDA kernels are compiled for the CPU (csrc/emulator).
PYBIND11_MODULE(VITKERN_MODULE, m) {
  using namespace vitkern;

  m.attr("version") = VITKERN_VERSION;
  m.attr("compiler") = VITKERN_COMPILER;
#ifdef VITKERN_WITH_CUDA
  m.attr("cuda_version") = VITKERN_CUDA_VERSION;
  m.attr("cuda_architectures") = VITKERN_CUDA_ARCHITECTURES;
#else
  m.attr("cuda_version") = py::none();
  m.attr("cuda_architectures") = "";
#endif
  m.attr("cuda_reason") = VITKERN_CUDA_REASON;  // why there are no CUDA kernels, or empty

#ifndef VITKERN_EMULATED
#ifdef VITKERN_WITH_CUDA
  m.def("cuda_driver", &cuda_driver);
#else
  m.def("cuda_driver", [] { return std::make_pair(0, 0); });
#endif
  m.def("compiled_cpu_isas", &compiled_cpu_isas);
  m.def("supported_cpu_isas", &supported_cpu_isas);
  m.def("cpu_isa", &cpu_isa_name);
  m.def("set_cpu_isa", &set_cpu_isa);

  py::class_<Signer>(m, "Signer", py::module_local())
      .def(py::init<py::object, py::object, py::type, py::type>())
      .def("__call__", &Signer::operator());
  py::class_<Watch>(m, "Watch", py::module_local())
      .def(py::init<py::tuple, py::dict>())
      .def("__call__", &Watch::operator());
  m.def("fast_path",
        [](const Signer& signer, const Watch& watched, py::object asks_gradients, Py_ssize_t tensors,
           py::tuple defaults, std::vector<Py_ssize_t> recorded, py::dict plans, bool whole) {
          return make_function(FastPath(signer, watched, std::move(asks_gradients), tensors,
                                        std::move(defaults), std::move(recorded), std::move(plans), whole));
        });
  m.def("fast_backward", [](const Signer& signer, const Watch& watched, py::object asks_gradients,
                            const std::vector<py::bytes>& signatures, py::object kernel) {
    return make_function(FastBackward(signer, watched, std::move(asks_gradients),
                                      {signatures.begin(), signatures.end()}, std::move(kernel)));
  });
#endif

  py::class_<Host> host(m, "Host", py::module_local());
  host.def(py::init<bool, py::object, int, py::object, py::object>(), py::kw_only(), py::arg("cuda"),
           py::arg("borrow"), py::arg("device"), py::arg("where"), py::arg("workspace"));
  bindings::ms_deform_attn::bind(host);
  bindings::adapter_bottleneck::bind(host);
  bindings::token_pool::bind(host);
  bindings::token_project::bind(host);
}
