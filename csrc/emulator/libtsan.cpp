// SPDX-License-Identifier: Apache-2.0
// A second opinion on races: the orders that races.cpp keeps in clocks of its own, told to gcc's libtsan. The compiler's
// calls before each access go to libtsan itself, which remembers and judges them; this file only says what is ordered.
//
// A thread of a block is a fiber of libtsan, which lives to the end of the launch: so no two blocks are ordered, and
// none inherits another's accesses. A barrier is a release by all its threads, then an acquire by all, of a place used
// for that alone. A copy by cp.async is a fiber too, begun by its thread, which waits for its end. libtsan ignores what
// the emulator itself accesses.
//
// libtsan is to be in the process from its start, and finds no read of shared memory that nothing has written.
#include <sanitizer/tsan_interface.h>

#include "emulator/watched.h"

extern "C" {
void __tsan_ignore_thread_begin();
void __tsan_ignore_thread_end();
void __tsan_read_range_pc(const void* address, size_t bytes, const void* caller);
void __tsan_write_range_pc(const void* address, size_t bytes, const void* caller);
uint16_t __tsan_atomic16_fetch_add(volatile uint16_t* address, uint16_t addend, int order);
uint32_t __tsan_atomic32_fetch_add(volatile uint32_t* address, uint32_t addend, int order);
uint64_t __tsan_atomic64_fetch_add(volatile uint64_t* address, uint64_t addend, int order);
// For runtimes that use the same memory again for something new.
void __tsan_java_init(uintptr_t heap, size_t bytes);
void __tsan_java_alloc(uintptr_t begin, size_t bytes);
}

namespace emulator {

namespace races {
namespace {

using TsanFiber = void*;

struct Launch {
  TsanFiber host = nullptr;
  std::vector<TsanFiber> fibers;  // of all threads of the blocks that have begun
  std::vector<TsanFiber> copies;
  size_t first = 0;               // in fibers, of the running block
  std::vector<bool> have_stacks;  // threads of the block that have run
} launch;

thread_local bool kernel_runs = false;

void become(TsanFiber fiber) { __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync); }

template <typename Call>
void as(TsanFiber fiber, const Call& call) {
  const TsanFiber before = __tsan_get_current_fiber();
  become(fiber);
  call();
  become(before);
}

template <typename Call>
void unless_ignored(const Call& call) {
  __tsan_ignore_thread_end();
  call();
  __tsan_ignore_thread_begin();
}

TsanFiber new_fiber() {
  const TsanFiber fiber = __tsan_create_fiber(0);  // ordered after the running one
  as(fiber, __tsan_ignore_thread_begin);
  return fiber;
}

// All that `before` have done comes before all that `after` are going to do.
void order(const std::vector<TsanFiber>& before, const std::vector<TsanFiber>& after) {
  const auto place = std::make_unique<uint64_t>();
  for (TsanFiber fiber : before) as(fiber, [&] { __tsan_release(place.get()); });
  for (TsanFiber fiber : after) as(fiber, [&] { __tsan_acquire(place.get()); });
}

void end(std::vector<TsanFiber>& fibers) {
  order(fibers, {launch.host});
  for (TsanFiber fiber : fibers) {
    as(fiber, __tsan_ignore_thread_end);
    __tsan_destroy_fiber(fiber);
  }
  fibers.clear();
}

// Forgets all accesses to what is memory of another block, or stack of another thread, from now on.
void begin_anew(uintptr_t begin, size_t bytes) {
  constexpr uintptr_t kAlignment = 8;
  static const bool once = (__tsan_java_init(kAlignment, uintptr_t{1} << 62), true);
  const uintptr_t first = begin / kAlignment * kAlignment, past = begin + bytes + kAlignment - 1;
  if (once && bytes) __tsan_java_alloc(first, past / kAlignment * kAlignment - first);
}

// Adds nothing, in one atomic operation for each number.
void update(uintptr_t address, size_t bytes) {
  constexpr int kRelaxed = __ATOMIC_RELAXED;
  if (bytes == 2) __tsan_atomic16_fetch_add(reinterpret_cast<uint16_t*>(address), 0, kRelaxed);
  if (bytes == 8) __tsan_atomic64_fetch_add(reinterpret_cast<uint64_t*>(address), 0, kRelaxed);
  for (size_t i = 0; (bytes == 4 || bytes == 16) && i < bytes; i += 4)
    __tsan_atomic32_fetch_add(reinterpret_cast<uint32_t*>(address + i), 0, kRelaxed);
}

}  // namespace

Recording::Recording(bool kernel) : before_(std::exchange(kernel_runs, kernel)) {
  if (before_ && !kernel) __tsan_ignore_thread_begin();
  if (!before_ && kernel) __tsan_ignore_thread_end();
}
Recording::~Recording() {
  if (before_ && !kernel_runs) __tsan_ignore_thread_end();
  if (!before_ && kernel_runs) __tsan_ignore_thread_begin();
  kernel_runs = before_;
}

std::vector<int64_t> order_of_blocks(int64_t count) { return drawn_blocks(count); }

void launch_begins(const char*, const void*, int64_t) {
  launch.host = __tsan_get_current_fiber();
  __tsan_ignore_thread_begin();
}

std::string launch_ends() {
  end(launch.copies);
  end(launch.fibers);
  __tsan_ignore_thread_end();
  return {};  // libtsan reports
}

void block_begins(uint3, int threads, const void* dynamic_shared, size_t bytes) {
  launch.first = launch.fibers.size();
  for (int i = 0; i < threads; ++i) launch.fibers.push_back(new_fiber());
  launch.have_stacks.assign(threads, false);
  begin_anew(reinterpret_cast<uintptr_t>(dynamic_shared), bytes);
  const Range declared = module_of(reinterpret_cast<const void*>(&launch_begins)).declared;
  begin_anew(declared.begin, declared.bytes);
}

void names_dynamic_shared(const char*) {}

void thread_runs(int thread, const void* stack, size_t bytes) {
  if (!launch.have_stacks[thread]) begin_anew(reinterpret_cast<uintptr_t>(stack), bytes);
  launch.have_stacks[thread] = true;
  become(launch.fibers[launch.first + thread]);
}

void scheduler_runs() { become(launch.host); }

void block_barrier(const Site& site) {
  if (switched_off(site)) return;
  const std::vector<TsanFiber> all(launch.fibers.begin() + launch.first, launch.fibers.end());
  order(all, all);
}

void warp_barrier(const Site& site, int first_thread, unsigned mask) {
  if (switched_off(site)) return;
  std::vector<TsanFiber> lanes;
  for (int lane = 0; lane < kWarpLanes; ++lane)
    if (mask >> lane & 1u) lanes.push_back(launch.fibers[launch.first + first_thread + lane]);
  order(lanes, lanes);
}

void warp_meets(int, unsigned) {}

void sees(Access access, const void* address, size_t bytes, const void* caller) {
  unless_ignored([&] {
    if (access == Access::kRead) __tsan_read_range_pc(address, bytes, caller);
    if (access == Access::kWrite) __tsan_write_range_pc(address, bytes, caller);
    if (access == Access::kUpdate) update(reinterpret_cast<uintptr_t>(address), bytes);
  });
}

void sees_row(const void*, const void*) {}
void fills(size_t) {}

// `epoch` is the copy's number.
Clock copy_begins(const void*, const void*, const void*) {
  Clock copy;
  copy.epoch = static_cast<uint32_t>(launch.copies.size());
  launch.copies.push_back(new_fiber());
  return copy;
}

void copy_arrives(const Clock& before, const void* to, const void* from, size_t bytes, const void* caller) {
  const TsanFiber copy = launch.copies[before.epoch];
  as(copy, [&] {
    if (from) sees(Access::kRead, from, bytes, caller);
    sees(Access::kWrite, to, bytes, caller);
  });
  order({copy}, {__tsan_get_current_fiber()});
}

}  // namespace races
}  // namespace emulator
