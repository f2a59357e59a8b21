// SPDX-License-Identifier: Apache-2.0
// A fake CUDA driver, libcuda.so.1, without a card; FAKE_DRIVER sets its version. Any call other than the query of the
// version, such as the creation of a context, ends the process.
#include <cstdlib>
#include <cstring>

namespace {

int init(unsigned) { return 100; }  // no device
int version(int* found) { return *found = std::atoi(std::getenv("FAKE_DRIVER")), 0; }
int table(const void**, const void*) { return 500; }  // not found
int refused() { std::abort(); }

}  // namespace

extern "C" int cuGetProcAddress_v2(const char* name, void** found, int, unsigned long long, int* status) {
  const struct {
    const char* name;
    void* function;
  } functions[] = {{"", reinterpret_cast<void*>(&cuGetProcAddress_v2)},
                   {"cuGetProcAddress", reinterpret_cast<void*>(&cuGetProcAddress_v2)},
                   {"cuInit", reinterpret_cast<void*>(&init)},
                   {"cuDriverGetVersion", reinterpret_cast<void*>(&version)},
                   {"cuGetExportTable", reinterpret_cast<void*>(&table)}};
  *found = reinterpret_cast<void*>(&refused);
  for (const auto& one : functions)
    if (std::strcmp(one.name, name) == 0) *found = one.function;
  if (status) *status = 0;
  return 0;
}
