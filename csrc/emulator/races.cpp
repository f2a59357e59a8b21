// SPDX-License-Identifier: Apache-2.0
// Finds data races of emulated kernels, whatever order their threads ran in: the functions that -fsanitize=thread
// calls before each access, with CUDA's rules in place of libtsan's. shadow.h says what a race is, and why it is found.
#include <cstdio>
#include <map>
#include <set>
#include <tuple>

#include "emulator/access_hooks.h"
#include "emulator/shadow.h"
#include "emulator/watched.h"

namespace emulator {

namespace races {
namespace {

constexpr size_t kMostReports = 20;  // of a launch

struct Launch {
  std::string kernel;
  bool records = true;
  Module module;
  Memory global, shared;
  Range dynamic, stack;       // shared memory of this launch's size; of the running thread
  std::vector<uint3> blocks;  // that have begun
  std::vector<Clock> clocks;  // of the block's threads
  int thread = 0;
  std::set<std::tuple<uint32_t, uint32_t, Access, Access>> known;
  std::vector<std::string> found;
} launch;

std::vector<Range> names;               // of tensors, as the caller gave them
std::map<uintptr_t, int64_t> launched;  // most blocks, by kernel
thread_local bool kernel_runs = false;

uint32_t in_module(const void* caller) { return launch.module.offset_of(caller); }

// For a reader who has the module: tests/races.py replaces {...} by lines and variables.
std::string place_of(uintptr_t address) {
  char text[64];
  if (launch.module.declared.has(address)) {
    std::snprintf(text, sizeof text, "{variable 0x%zx}", size_t{address - launch.module.declared.begin});
    return text;
  }
  if (launch.dynamic.has(address))
    return launch.dynamic.name + " + " + std::to_string(address - launch.dynamic.begin) + " bytes";
  for (auto range = names.rbegin(); range != names.rend(); ++range)
    if (range->has(address)) return range->name + " + " + std::to_string(address - range->begin) + " bytes";
  std::snprintf(text, sizeof text, "memory at 0x%zx", size_t{address});
  return text;
}

std::string line_of(uint32_t caller) {
  char text[32];
  std::snprintf(text, sizeof text, "{line 0x%x}", caller);
  return text;
}

std::string thread_of(uint32_t block, int thread) {
  const uint3 at = launch.blocks[block - 1];
  return "thread " + std::to_string(thread) + " of block (" + std::to_string(at.x) + ", " +
         std::to_string(at.y) + ", " + std::to_string(at.z) + ")";
}

void report(const Record& mine, Access access, const Record* other, Access of_other, uintptr_t address) {
  static const char* const kVerbs[] = {"reads", "writes", "updates"};
  if (!launch.known.insert({mine.caller, other ? other->caller : 0, access, of_other}).second) return;
  std::string text = launch.kernel + ": " + thread_of(mine.block, mine.thread) + " " +
                     kVerbs[static_cast<int>(access)] + " " + place_of(address) + " at " +
                     line_of(mine.caller);
  text += !other ? ", shared memory that nothing has written"
                 : "; unordered with it, " + thread_of(other->block, other->thread) + " " +
                       kVerbs[static_cast<int>(of_other)] + " it at " + line_of(other->caller);
  launch.found.push_back(text);
}

void check(Cell& cell, Access access, const Clock& clock, const Record& mine, uintptr_t address,
           bool shared) {
  const Record* other = nullptr;
  if (shared && access != Access::kWrite && cell.write.block == 0 && !cell.updates)
    report(mine, access, nullptr, access, address);
  if (!ordered(cell.write, clock)) report(mine, access, &cell.write, Access::kWrite, address);
  if (access != Access::kUpdate && cell.updates && (other = cell.updates->unordered(clock)))
    report(mine, access, other, Access::kUpdate, address);
  if (access != Access::kRead && (other = cell.reads.unordered(clock)))
    report(mine, access, other, Access::kRead, address);
}

void keep(Cell& cell, Access access, const Record& mine) {
  if (access == Access::kRead) return cell.reads.add(mine);
  if (access == Access::kUpdate) {
    if (!cell.updates) cell.updates = std::make_unique<Accesses>();
    return cell.updates->add(mine);
  }
  cell.write = mine;
  cell.reads.first = cell.reads.other = {};
  cell.updates.reset();
}

// Every cell of an access that is to come after all that `before` is after.
void pass(Access access, const Clock& before, const void* address, size_t bytes, const void* caller) {
  if (!launch.records) return;
  const Clock& now = launch.clocks[launch.thread];
  const Record mine{now.block, now.epoch, now.lanes[now.thread % kWarpLanes], in_module(caller),
                    static_cast<uint16_t>(now.thread)};
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
  const bool shared = launch.module.declared.has(begin) || launch.dynamic.has(begin);
  Memory& memory = shared ? launch.shared : launch.global;
  for (uintptr_t at = begin - begin % kCellBytes; at < begin + bytes; at += kCellBytes) {
    Cell& cell = memory.at(at);
    check(cell, access, before, mine, at, shared);
    keep(cell, access, mine);
  }
}

void on_access(Access access, const void* address, size_t bytes, const void* caller) {
  if (!kernel_runs || launch.stack.has(reinterpret_cast<uintptr_t>(address))) return;
  const Recording none(false);
  Block::current().may_switch();
  pass(access, launch.clocks[launch.thread], address, bytes, caller);
}

}  // namespace

Recording::Recording(bool kernel) : before_(std::exchange(kernel_runs, kernel)) {}
Recording::~Recording() { kernel_runs = before_; }

std::vector<int64_t> order_of_blocks(int64_t count) { return drawn_blocks(count); }

// CUDA_EMU_RACES=0 looks for no races.
void launch_begins(const char* kernel, const void* function, int64_t blocks) {
  const char* const records = std::getenv("CUDA_EMU_RACES");
  launch.kernel = kernel;
  launch.module = module_of(reinterpret_cast<const void*>(&launch_begins));
  launch.records = !records || *records != '0';
  launch.global.clear();
  launch.blocks.clear(), launch.known.clear(), launch.found.clear();
  int64_t& most = launched[in_module(function)];
  most = std::max(most, blocks);
}

std::string launch_ends() {
  std::string text;
  for (size_t i = 0; i < std::min(launch.found.size(), kMostReports); ++i) text += launch.found[i] + "\n";
  return text.empty() ? text : "races of emulated kernel " + text;
}

void block_begins(uint3 index, int threads, const void* dynamic_shared, size_t bytes) {
  launch.blocks.push_back(index);
  launch.shared.clear();
  launch.dynamic = {"dynamic shared memory", reinterpret_cast<uintptr_t>(dynamic_shared), bytes};
  launch.clocks.assign(threads, {});
  for (int i = 0; i < threads; ++i) {
    Clock& clock = launch.clocks[i];
    clock.block = static_cast<uint32_t>(launch.blocks.size()), clock.thread = i;
    clock.lanes[i % kWarpLanes] = 1;
  }
}

void names_dynamic_shared(const char* name) { launch.dynamic.name = name; }

void thread_runs(int thread, const void* stack, size_t bytes) {
  launch.thread = thread;
  launch.stack = {"", reinterpret_cast<uintptr_t>(stack), bytes};
}

void scheduler_runs() {}

void block_barrier(const Site& site) {
  if (switched_off(site)) return;
  for (Clock& clock : launch.clocks) ++clock.epoch;
}

void warp_barrier(const Site& site, int first_thread, unsigned mask) {
  if (switched_off(site)) return;
  std::array<uint32_t, kWarpLanes> all{};
  const auto for_lanes = [&](const auto& call) {
    for (int lane = 0; lane < kWarpLanes; ++lane)
      if (mask >> lane & 1u) call(launch.clocks[first_thread + lane].lanes, lane);
  };
  for_lanes([&](const auto& lanes, int) {
    for (int i = 0; i < kWarpLanes; ++i) all[i] = std::max(all[i], lanes[i]);
  });
  for_lanes([&](auto& lanes, int lane) { lanes = all, ++lanes[lane]; });
}

void sees(Access access, const void* address, size_t bytes, const void* caller) {
  pass(access, launch.clocks[launch.thread], address, bytes, caller);
}

void warp_meets(int, unsigned) {}
void sees_row(const void*, const void*) {}
void fills(size_t) {}

Clock copy_begins(const void*, const void*, const void*) {
  Clock& now = launch.clocks[launch.thread];
  const Clock before = now;
  ++now.lanes[now.thread % kWarpLanes];
  return before;
}

void copy_arrives(const Clock& before, const void* to, const void* from, size_t bytes, const void* caller) {
  if (from) pass(Access::kRead, before, from, bytes, caller);
  pass(Access::kWrite, before, to, bytes, caller);
}

}  // namespace races
}  // namespace emulator

// ---- What the compiler calls

using emulator::races::Access;
using emulator::races::on_access;

VITKERN_HOOK __tsan_func_entry(void*) {}
VITKERN_HOOK __tsan_func_exit() {}
VITKERN_ACCESS_HOOKS(Access::kRead, Access::kWrite)

// ---- What Python calls

// Reports name the tensor that an address lies in; the last one given is meant.
VITKERN_SERVED void vitkern_races_name(const char* name, const void* begin, size_t bytes) {
  emulator::races::names.push_back({name, reinterpret_cast<uintptr_t>(begin), bytes});
}
VITKERN_SERVED void vitkern_races_forget_names() { emulator::races::names.clear(); }

// A line for each kernel that has run: its address in the module, and the most blocks of a launch.
VITKERN_SERVED const char* vitkern_races_launched() {
  static std::string text;
  text.clear();
  for (const auto& [kernel, blocks] : emulator::races::launched)
    text += std::to_string(kernel) + " " + std::to_string(blocks) + "\n";
  return text.c_str();
}
