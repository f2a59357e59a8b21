// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <utility>

namespace vitkern {

// The newest CUDA that the machine's driver serves, 0 without a driver, and the CUDA of the runtime in this
// module: 12020 is 12.2. Creates no context.
std::pair<int, int> cuda_driver();

}  // namespace vitkern
