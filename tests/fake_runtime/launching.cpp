// SPDX-License-Identifier: Apache-2.0
// Runs guards and launches of csrc/common/launch.cuh in the scenario of the given name, then prints the state of the
// fake runtime.
#include <cstdio>
#include <functional>
#include <map>
#include <string>

#include "common/launch.cuh"

using vitkern::DeviceGuard;

__global__ void kernel(long long, const void*) {}

// On a device, with an int for the kernel's wider parameter.
void launch_on(int device, size_t shared_bytes, unsigned blocks = 1) {
  try {
    const DeviceGuard guard(device);
    vitkern::launch("kernel", kernel, dim3(blocks), dim3(32), shared_bytes, nullptr, device - 8, nullptr);
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
  }
}

void use(int device) {
  cudaSetDevice(device);
  fake::switches = 0;
}

const std::map<std::string, std::function<void()>> scenarios = {
    {"no_context", [] { launch_on(1, 0); }},
    {"no_context_twice", [] { launch_on(1, 0), launch_on(1, 0); }},
    {"no_context_on_its_device", [] { launch_on(0, 0); }},
    {"current_device", [] { use(1), launch_on(1, 0); }},
    {"another_device", [] { use(0), launch_on(1, 0); }},
    {"no_such_device", [] { use(0), launch_on(7, 0), launch_on(0, 0); }},
    {"no_blocks", [] { use(0), launch_on(0, 0, 0), launch_on(0, 0); }},
    {"an_error_of_others", [] { use(0), fake::fail(cudaErrorInvalidValue), launch_on(0, 0); }},
    {"much_and_less", [] { use(0), launch_on(0, 90 << 10), launch_on(0, 60 << 10), launch_on(0, 99 << 10); }},
    {"much_on_two_devices", [] { use(0), launch_on(0, 90 << 10), launch_on(1, 90 << 10); }},
    {"too_much", [] { use(0), launch_on(0, 228 << 10), launch_on(0, 90 << 10); }},
};

int main(int, char** arguments) {
  scenarios.at(arguments[1])();
  std::printf("contexts");
  for (const auto& context : fake::contexts)
    if (context.exists) std::printf(" %d", context.device);
  std::printf("\ncurrent %s\n", fake::current ? std::to_string(fake::current->device).c_str() : "none");
  std::printf("launches");
  for (const auto& launch : fake::launches) std::printf(" %d:%lld", launch.device, launch.argument);
  std::printf("\nswitches %d\nlimits set %d\nlast error %d\n", fake::switches, fake::limits_set, fake::last);
}
