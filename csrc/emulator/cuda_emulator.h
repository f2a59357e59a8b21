// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels on the CPU, for tests: g++ compiles the .cu file that nvcc compiles, unchanged.
//
// Each CUDA thread is a fiber: a stack of its own and a switch of a dozen instructions. One OS thread runs a block,
// each fiber up to its next barrier or warp operation; OpenMP spreads the blocks over threads.
// CUDA_EMU_ORDER=1 runs the threads of a block backwards: a result that differs depends on the order.
// CUDA_EMU_SEED=n draws the next thread at random at each barrier and warp operation and, in a build with
// VITKERN_WATCHED, before any access to memory (schedules); the same n gives the same schedule.
//
// Caught, with kernel and block named: barriers that part of a block never reaches, warp operations
// whose lanes do not all come or whose mask lacks one, impossible launches; under AddressSanitizer
// and UBSan, overruns; in a build with VITKERN_WATCHED, races (races.cpp).
// docs/emulator.md has what is modelled and what is not.
#pragma once

#include <math.h>  // the overloads of C++, in the global namespace

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "emulator/cuda_types.h"
#include "emulator/races.h"
#include "emulator/stack_switch.h"

namespace emulator {

constexpr size_t kStackBytes = 512 << 10;  // without optimisation each variable has a place of its own
constexpr size_t kCopyBytes = 16;          // of cp.async

enum class Waits { kForNothing, kForBlock, kForWarp, kEnded };

// A lane's input to an operation of its warp, and its result.
struct Meeting {
  const char* operation;
  unsigned mask;
  int source;  // the lane whose value is read; below 0: a bit from every lane
  uint64_t value;
};

// 16 bytes on their way to shared memory; zeros where `from` is null.
struct Copy {
  void* to;
  const void* from;
  int group;
  const void* caller;
  races::Clock before;
};

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  void* top = nullptr;
  void* sanitizer_stack = nullptr;
  int index = 0;
  uint3 thread{};
  Waits waits = Waits::kForNothing;
  Meeting meeting{};
  Site site;  // of the last barrier
  std::vector<Copy> copies;
  int groups = 0;  // of copies that were committed
};

// The block that this OS thread runs. Fibers are kept for later blocks: a stack that AddressSanitizer has
// seen in use must not begin anew.
class Block {
 public:
  static Block& current() {
    static thread_local Block block;
    return block;
  }

  Fiber* fiber = nullptr;  // the running thread
  dim3 grid_dim, block_dim;
  uint3 index{};
  std::vector<char> dynamic_shared;

  void run(const char* kernel, dim3 grid, dim3 block, uint3 block_index, size_t shared_bytes,
           const std::function<void()>& body) {
    kernel_ = kernel, grid_dim = grid, block_dim = block, index = block_index, body_ = &body;
    // Exactly the requested size, and NaN: overruns meet a red zone, and reads of unwritten memory show.
    std::vector<char>(shared_bytes, '\xff').swap(dynamic_shared);
    threads_ = static_cast<int>(block.x * block.y * block.z);
    all_hold_ = true;
    waiting_.assign((threads_ + kWarpLanes - 1) / kWarpLanes, 0);
    while (static_cast<int>(fibers_.size()) < threads_) add_fiber();
    std::fill(counts_, std::end(counts_), 0);
    counts_[static_cast<int>(Waits::kForNothing)] = threads_;
    for (int i = 0; i < threads_; ++i) {
      const unsigned t = i;
      fibers_[i]->thread = {t % block.x, t / block.x % block.y, t / (block.x * block.y)};
      fibers_[i]->waits = Waits::kForNothing;
    }
    choose_schedule();
    races::block_begins(block_index, threads_, dynamic_shared.data(), shared_bytes);
    while (count(Waits::kEnded) < threads_) {
      if (count(Waits::kForNothing) == 0) release_block();
      resume(next_fiber());
    }
  }

  // Whether the predicate holds for every thread of the block.
  bool sync_threads(const Site& site, bool predicate = true) {
    all_hold_ &= predicate;
    fiber->site = site;
    set(*fiber, Waits::kForBlock);
    yield();
    return held_;
  }

  // An operation of the lanes of `mask`: waits for all of them; the last to come serves the others.
  uint64_t meet(const char* operation, unsigned mask, uint64_t value, int source,
                const Site* barrier = nullptr) {
    Fiber& me = *fiber;
    const int lane = me.index % kWarpLanes, first = me.index - lane;
    const int lanes = std::min(kWarpLanes, threads_ - first);
    if (lanes < kWarpLanes) mask &= (1u << lanes) - 1;
    const auto in_mask = [&](int i) { return i >= 0 && i < lanes && (mask >> i & 1u); };
    if (!in_mask(lane))
      fail(std::string(operation) + " by lane " + std::to_string(lane) + " whose mask lacks it");
    if (source >= 0 && !in_mask(source))
      fail(std::string(operation) + " from lane " + std::to_string(source) + ", which takes no part");
    me.meeting = {operation, mask, source, value};
    set(me, Waits::kForWarp);

    unsigned& waiting = waiting_[first / kWarpLanes];
    waiting |= 1u << lane;
    if ((waiting & mask) != mask) {
      yield();
      return me.meeting.value;
    }
    waiting &= ~mask;
    uint64_t values[kWarpLanes] = {}, bits = 0;
    for (int i = 0; i < lanes; ++i) {
      if (!in_mask(i)) continue;
      const Meeting& other = fibers_[first + i]->meeting;
      if (other.operation != operation || other.mask != mask)
        fail(std::string("lanes of a warp meet in ") + operation + " and " + other.operation +
             ", or with different masks");
      values[i] = other.value;
      bits |= uint64_t{other.value != 0} << i;
    }
    for (int i = 0; i < lanes; ++i) {
      if (!in_mask(i)) continue;
      Fiber& other = *fibers_[first + i];
      other.meeting.value = other.meeting.source < 0 ? bits : values[other.meeting.source];
      set(other, Waits::kForNothing);
    }
    races::warp_meets(first, mask);
    if (barrier) races::warp_barrier(*barrier, first, mask);
    may_switch();
    return me.meeting.value;
  }

  // The caller's copies. They arrive when they are waited for, never before; until then the target is NaN.
  void copy(void* to, const void* from, const void* caller) {
    std::memset(to, 0xff, kCopyBytes);
    fiber->copies.push_back({to, from, fiber->groups, caller, races::copy_begins(to, from, caller)});
  }
  void wait_for_groups_before(int end) { arrive(*fiber, end); }

  // Where a schedule is drawn at random, another thread may go on here.
  void may_switch() {
    if (seed_ == 0 || --until_switch_ > 0) return;
    until_switch_ = 1 + static_cast<int>(random_() % (2u << seed_ % 7));
    yield();
  }

 private:
  // Seeds differ in how often they switch, too.
  void choose_schedule() {
    const char *order = std::getenv("CUDA_EMU_ORDER"), *seed = std::getenv("CUDA_EMU_SEED");
    step_ = order && *order == '1' ? threads_ - 1 : 1;
    last_ = step_ == 1 ? threads_ - 1 : 0;
    seed_ = seed ? static_cast<unsigned>(std::atoi(seed)) : 0;
    random_.seed(seed_ + 2654435761u * (index.x + 7919 * index.y + 104729 * index.z));
    until_switch_ = 1;
  }

  Fiber& next_fiber() {
    if (seed_) last_ = static_cast<int>(random_() % threads_);
    do last_ = (last_ + step_) % threads_;
    while (fibers_[last_]->waits != Waits::kForNothing);
    return *fibers_[last_];
  }

  // All wait: at one barrier, or for ever.
  void release_block() {
    if (count(Waits::kForBlock) < threads_)
      abandon("deadlock: of " + std::to_string(threads_) + " threads " +
              std::to_string(count(Waits::kForBlock)) + " wait at __syncthreads, " +
              std::to_string(count(Waits::kForWarp)) + " in a warp operation, " +
              std::to_string(count(Waits::kEnded)) + " have ended");
    for (int i = 1; i < threads_; ++i)
      if (fibers_[i]->site != fibers_[0]->site) abandon("threads wait at different barriers");
    held_ = std::exchange(all_hold_, true);
    for (int i = 0; i < threads_; ++i) set(*fibers_[i], Waits::kForNothing);
    races::block_barrier(fibers_[0]->site);
  }

  void add_fiber() {
    fibers_.push_back(std::make_unique<Fiber>());
    Fiber& added = *fibers_.back();
    added.index = static_cast<int>(fibers_.size()) - 1;
    const uintptr_t end = reinterpret_cast<uintptr_t>(added.stack.get() + kStackBytes) & ~uintptr_t{15};
    void** words = reinterpret_cast<void**>(end) - kSavedWords;
    std::fill(words, words + kSavedWords, nullptr);
    words[kReturnWord] = reinterpret_cast<void*>(&Block::fiber_main);
    added.top = words;
  }

  static void fiber_main() {
    Block& block = current();
    __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_bottom_, &block.scheduler_bytes_);
    for (;;) {
      (*block.body_)();
      block.arrive(*block.fiber, block.fiber->groups + 1);
      block.set(*block.fiber, Waits::kEnded);
      block.yield();
    }
  }

  void resume(Fiber& next) {
    fiber = &next;
    races::thread_runs(next.index, next.stack.get(), kStackBytes);
    void* own_sanitizer_stack = nullptr;
    __sanitizer_start_switch_fiber(&own_sanitizer_stack, next.stack.get(), kStackBytes);
    vitkern_switch_stack(&scheduler_top_, next.top);
    races::scheduler_runs();
    __sanitizer_finish_switch_fiber(own_sanitizer_stack, nullptr, nullptr);
    if (!failure_.empty()) abandon(failure_);
  }

  void yield() {
    Fiber& me = *fiber;
    __sanitizer_start_switch_fiber(&me.sanitizer_stack, scheduler_bottom_, scheduler_bytes_);
    vitkern_switch_stack(&me.top, scheduler_top_);
    __sanitizer_finish_switch_fiber(me.sanitizer_stack, nullptr, nullptr);
  }

  // No exception can leave a fiber: the scheduler throws for it, and the fiber never runs again.
  void fail(const std::string& message) {
    failure_ = message;
    yield();
  }

  [[noreturn]] void abandon(const std::string& reason) {
    const std::string message = std::string("emulated kernel ") + kernel_ + ", block (" +
                                std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
                                std::to_string(index.z) + "): " + reason;
    fibers_.clear();
    failure_.clear();
    throw std::runtime_error(message);
  }

  void arrive(Fiber& fiber, int end) {
    size_t arrived = 0;
    for (; arrived < fiber.copies.size() && fiber.copies[arrived].group < end; ++arrived) {
      const Copy& copy = fiber.copies[arrived];
      if (copy.from) {
        std::memcpy(copy.to, copy.from, kCopyBytes);
      } else {
        std::memset(copy.to, 0, kCopyBytes);
      }
      races::copy_arrives(copy.before, copy.to, copy.from, kCopyBytes, copy.caller);
    }
    fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + arrived);
  }

  int count(Waits state) const { return counts_[static_cast<int>(state)]; }

  void set(Fiber& fiber, Waits state) {
    --counts_[static_cast<int>(fiber.waits)];
    ++counts_[static_cast<int>(state)];
    fiber.waits = state;
  }

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<unsigned> waiting_;  // for each warp, the lanes in a warp operation
  int threads_ = 0;
  int counts_[4] = {};       // of fibers, by what they wait for
  int last_ = 0, step_ = 1;  // the fiber that ran last, and the way to the next
  unsigned seed_ = 0;        // 0: threads take turns
  int until_switch_ = 1;
  std::minstd_rand random_;
  bool all_hold_ = true, held_ = true;  // of the predicates at the barrier that fills, and at the last one
  const char* kernel_ = "";
  const std::function<void()>* body_ = nullptr;
  std::string failure_;
  void* scheduler_top_ = nullptr;
  const void* scheduler_bottom_ = nullptr;
  size_t scheduler_bytes_ = 0;
};

}  // namespace emulator

#include "emulator/cuda_language.h"
