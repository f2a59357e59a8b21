// SPDX-License-Identifier: Apache-2.0
#include "common/cuda_driver.h"

#include <cuda_runtime_api.h>

namespace vitkern {

std::pair<int, int> cuda_driver() {
  int driver = 0, runtime = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
  cudaRuntimeGetVersion(&runtime);
  cudaGetLastError();
  return {driver, runtime};
}

}  // namespace vitkern
