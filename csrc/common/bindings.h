// SPDX-License-Identifier: Apache-2.0
// What the bindings of all ops share: addresses come in as integers, and the GIL is let go while a kernel runs.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "common/dtype.h"

namespace vitkern {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using WithoutGil = pybind11::call_guard<pybind11::gil_scoped_release>;

}  // namespace vitkern
