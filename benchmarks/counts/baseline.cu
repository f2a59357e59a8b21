// SPDX-License-Identifier: Apache-2.0
// Starts the baseline's kernels as Deformable-DETR starts its own, for Python: floats, 32 channels a head.
#include "benchmarks/baseline_msda.cuh"

namespace {

constexpr int kChannels = 32, kForwardThreads = 1024;

}  // namespace

extern "C" __attribute__((visibility("default"))) void baseline_forward(const baseline::Arguments* arguments) {
  const int64_t blocks = vitkern::blocks_of(arguments->outputs, kForwardThreads);
  vitkern::launch("msda_forward", baseline::msda_forward<float>, dim3(vitkern::grid_blocks(blocks)),
                  dim3(kForwardThreads), 0, nullptr, *arguments);
}

extern "C" __attribute__((visibility("default"))) void baseline_backward(const baseline::Arguments* arguments) {
  const int64_t blocks = arguments->outputs / kChannels;
  vitkern::launch("msda_backward", baseline::msda_backward<float, kChannels>, dim3(vitkern::grid_blocks(blocks)),
                  dim3(kChannels), 0, nullptr, *arguments);
}
