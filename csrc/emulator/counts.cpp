// SPDX-License-Identifier: Apache-2.0
// Counts the memory accesses of emulated kernels and the rounds of their loops: the functions that
// -fsanitize=thread calls before each access and -fsanitize-coverage=trace-pc at each step of the code. They are linked
// in place of the race detector's, and the kernels are compiled without optimisation: what is counted is what the source
// says. warp_replay.h puts the lanes of a warp together, tally.h has the rules, docs/counts.md says how to read them.
#include "emulator/access_hooks.h"
#include "emulator/counting.h"
#include "emulator/counts_told.h"

namespace emulator {

namespace counts {
namespace {

constexpr int64_t kCountedAtLeast = 32;  // blocks

int64_t number_of(const char* variable, int64_t otherwise) {
  const char* value = std::getenv(variable);
  return value ? std::atoll(value) : otherwise;
}

}  // namespace
}  // namespace counts

namespace races {

Recording::Recording(bool kernel) : before_(std::exchange(counts::kernel_runs, kernel)) {}
Recording::~Recording() { counts::kernel_runs = before_; }

// CUDA_EMU_EVERY=16 counts every 16th block of a launch of 512 or more; the others do not run, or run
// uncounted if the kernel is that of CUDA_EMU_REST=name, whose results decide what others read.
// CUDA_EMU_L1=132x4x192 models the L1 caches of 132 multiprocessors: four blocks at a time, 192 KB.
std::vector<int64_t> order_of_blocks(int64_t count) {
  std::vector<int64_t> order;
  for (int64_t i = 0; i < count; i += counts::launch.rest_runs ? 1 : counts::launch.every) order.push_back(i);
  return order;
}

void launch_begins(const char* kernel, const void*, int64_t blocks) {
  counts::launch = {};
  counts::Launch& launch = counts::launch;
  launch.kernel = kernel, launch.blocks = blocks;
  launch.every = counts::number_of("CUDA_EMU_EVERY", 1);
  if (blocks < counts::kCountedAtLeast * launch.every) launch.every = 1;
  const char* rest = std::getenv("CUDA_EMU_REST");
  launch.rest_runs = rest && launch.kernel == rest;
  if (const char* l1 = std::getenv("CUDA_EMU_L1")) {
    long kilobytes = 0;
    std::sscanf(l1, "%dx%dx%ld", &launch.l1.multiprocessors, &launch.l1.resident, &kilobytes);
    launch.l1.bytes = kilobytes << 10;
  }
  launch.module = module_of(reinterpret_cast<const void*>(&launch_begins));
}

std::string launch_ends() {
  if (counts::launch.counts) counts::end_block();
  counts::run_l1_model();
  counts::done += counts::told(counts::launch);
  return {};
}

void block_begins(uint3 index, int threads, const void* dynamic_shared, size_t bytes) {
  counts::Launch& launch = counts::launch;
  if (launch.counts) counts::end_block();
  launch.block = index.x, launch.counts = index.x % launch.every == 0;
  launch.threads = threads, launch.shared_bytes = static_cast<int64_t>(bytes);
  launch.dynamic = {"", reinterpret_cast<uintptr_t>(dynamic_shared), bytes};
  launch.warps.resize(launch.counts ? (threads + kWarpLanes - 1) / kWarpLanes : 0);
  launch.tally.counted += launch.counts;
}

void names_dynamic_shared(const char*) {}

void thread_runs(int thread, const void* stack, size_t bytes) {
  counts::thread = thread;
  counts::launch.stack = {"", reinterpret_cast<uintptr_t>(stack), bytes};
}

void scheduler_runs() {}

void warp_meets(int first_thread, unsigned mask) {
  counts::Launch& launch = counts::launch;
  const int lanes = static_cast<int>(std::min<int64_t>(kWarpLanes, launch.threads - first_thread));
  if (!launch.counts || mask != (lanes < kWarpLanes ? (1u << lanes) - 1 : ~0u)) return;
  counts::replay_warp(launch.warps[first_thread / kWarpLanes]);
  counts::wait(launch.warps[first_thread / kWarpLanes]);
}

void warp_barrier(const Site&, int, unsigned) {}

void block_barrier(const Site&) {
  counts::Launch& launch = counts::launch;
  if (!launch.counts) return;
  int64_t most = 0;
  for (counts::Warp& warp : launch.warps) {
    counts::replay_warp(warp);
    counts::wait(warp);
    most = std::max(most, warp.waits);
  }
  for (counts::Warp& warp : launch.warps) warp.waits = most;
  ++launch.tally.barriers;
}

void sees(Access access, const void* address, size_t bytes, const void* caller) {
  if (access == Access::kUpdate) counts::record_of_caller(counts::Kind::kReduction, address, bytes, caller);
}

void sees_row(const void* row, const void* caller) {
  counts::record_of_caller(counts::Kind::kLoad, row, kCopyBytes, caller);
}

void fills(size_t bytes) { counts::filled += static_cast<int64_t>(bytes); }

Clock copy_begins(const void* to, const void* from, const void* caller) {
  if (from) counts::record_of_caller(counts::Kind::kCopyFrom, from, kCopyBytes, caller);
  counts::record_of_caller(counts::Kind::kCopyTo, to, kCopyBytes, caller);
  return {};
}

void copy_arrives(const Clock&, const void*, const void*, size_t, const void*) {}

}  // namespace races
}  // namespace emulator

// ---- What the compiler calls

using emulator::counts::in_module;
using emulator::counts::Kind;
using emulator::counts::launch;
using emulator::counts::on_access;

VITKERN_HOOK __tsan_func_entry(void* caller) {
  if (!emulator::counts::kernel_runs || !launch.counts) return;
  uint16_t& path = emulator::counts::own_path();
  path = launch.paths.called(path, in_module(caller), in_module(__builtin_return_address(0)));
  emulator::counts::own_trace().push_back({0, 0, path, Kind::kCall, 0});
}
VITKERN_HOOK __tsan_func_exit() {
  if (!emulator::counts::kernel_runs || !launch.counts) return;
  uint16_t& path = emulator::counts::own_path();
  path = launch.paths.returned(path);
}
VITKERN_HOOK __sanitizer_cov_trace_pc() {
  if (!emulator::counts::kernel_runs || !launch.counts) return;
  const uint32_t place = in_module(__builtin_return_address(0));
  const uint16_t path = emulator::counts::own_path();
  if (launch.paths.leads_to(path, place))
    emulator::counts::own_trace().push_back({0, place, path, Kind::kStep, 0});
}
VITKERN_ACCESS_HOOKS(Kind::kLoad, Kind::kStore)

// ---- What Python calls

VITKERN_SERVED void vitkern_counts_name(const char* name, const void* begin, size_t bytes) {
  emulator::counts::names.push_back({name, reinterpret_cast<uintptr_t>(begin), bytes});
}

// A line of JSON for each launch since the last call, and the bytes that were filled; forgets both, and all names.
VITKERN_SERVED const char* vitkern_counts_take() {
  static std::string text;
  text = std::exchange(emulator::counts::done, {}) +
         "{\"filled\": " + std::to_string(std::exchange(emulator::counts::filled, 0)) + "}";
  emulator::counts::names.clear();
  return text.c_str();
}
