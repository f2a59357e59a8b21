// SPDX-License-Identifier: Apache-2.0
// The common part of the watchers: races.cpp, libtsan.cpp and counts.cpp, one of which is linked. They answer for the
// indices of the running thread and find the module of the kernels; the two detectors of races also share variables.
#pragma once

#include <dlfcn.h>
#include <link.h>

#include <numeric>

#include "emulator/cuda_emulator.h"

// A function that Python calls.
#define VITKERN_SERVED extern "C" __attribute__((visibility("default")))

namespace emulator {

uint3 thread_index() { return Block::current().fiber->thread; }
uint3 block_index() { return Block::current().index; }
dim3 block_extent() { return Block::current().block_dim; }
dim3 grid_extent() { return Block::current().grid_dim; }

struct Range {
  std::string name;
  uintptr_t begin = 0, bytes = 0;
  bool has(uintptr_t address) const { return address - begin < bytes; }
};

// The code and the data that an address lies in; `declared` are its variables of the running thread, among which are
// those that kernels declare __shared__.
struct Module {
  uintptr_t begin = 0;
  Range image, declared;

  uint32_t offset_of(const void* place) const {
    return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(place) - begin);
  }
};

inline Module module_of(const void* address) {
  Dl_info info{};
  dladdr(address, &info);
  Module module;
  module.begin = reinterpret_cast<uintptr_t>(info.dli_fbase);
  const auto find = [](dl_phdr_info* loaded, size_t, void* found) {
    Module& module = *static_cast<Module*>(found);
    if (loaded->dlpi_addr != module.begin) return 0;
    for (int i = 0; i < loaded->dlpi_phnum; ++i) {
      const auto& part = loaded->dlpi_phdr[i];
      if (part.p_type == PT_TLS)
        module.declared = {"", reinterpret_cast<uintptr_t>(loaded->dlpi_tls_data), part.p_memsz};
      if (part.p_type == PT_LOAD)
        module.image = {"", module.begin, std::max(module.image.bytes, part.p_vaddr + part.p_memsz)};
    }
    return 1;
  };
  dl_iterate_phdr(find, &module);
  return module;
}

namespace races {

std::mutex& one_launch() {
  static std::mutex mutex;
  return mutex;
}

// CUDA_EMU_BLOCKS=n leaves all but the first n out: what the others would have written is missing. CUDA_EMU_SEED=n
// draws an order.
inline std::vector<int64_t> drawn_blocks(int64_t count) {
  if (const char* most = std::getenv("CUDA_EMU_BLOCKS")) count = std::min(count, int64_t{std::atoi(most)});
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (const char* seed = std::getenv("CUDA_EMU_SEED"))
    std::shuffle(order.begin(), order.end(), std::minstd_rand(std::atoi(seed)));
  return order;
}

// CUDA_EMU_WITHOUT=forward.cuh:24 is a barrier that orders nothing.
inline bool switched_off(const Site& barrier) {
  const char* const without = std::getenv("CUDA_EMU_WITHOUT");
  const std::string site = std::string(barrier.file) + ":" + std::to_string(barrier.line);
  const std::string off = without ? without : "";
  return !off.empty() && site.size() >= off.size() &&
         site.compare(site.size() - off.size(), off.size(), off) == 0;
}

}  // namespace races
}  // namespace emulator
