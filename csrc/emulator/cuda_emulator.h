// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels on the CPU, for tests: g++ compiles the .cu file that nvcc compiles, unchanged.
//
// Each CUDA thread is a fiber: a stack of its own and a switch of a dozen instructions. A block lives
// on one OS thread, which runs each fiber up to its next barrier or warp operation; blocks spread
// over OpenMP threads.
// CUDA_EMU_ORDER=1 runs the threads of a block backwards: a result that differs depends on the order.
//
// Caught, with kernel and block named: barriers that part of a block never reaches, warp operations
// whose lanes do not all come or whose mask lacks one, impossible launches; and under AddressSanitizer
// and UBSan, overruns.
// Not modelled: memory ordering inside a block, the order of atomics, speed.
#pragma once

#if !defined(__ELF__) || !(defined(__x86_64__) || defined(__aarch64__))
#error "the CUDA emulator switches stacks in assembly, written for x86-64 and aarch64 with ELF only"
#endif

#include <math.h>  // the overloads of C++, in the global namespace

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "emulator/cuda_types.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#else
inline void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif

// ---- The switch: saves what a call must preserve, exchanges stacks, returns on the other

extern "C" void vitkern_switch_stack(void** saved, void* next);

#if defined(__x86_64__)
constexpr int kSavedWords = 8, kReturnWord = 6;  // the word above the return address aligns the stack
asm(R"(
  .text
  .weak vitkern_switch_stack
  .hidden vitkern_switch_stack
  .type vitkern_switch_stack, %function
vitkern_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#else
constexpr int kSavedWords = 20, kReturnWord = 11;
asm(R"(
  .text
  .weak vitkern_switch_stack
  .hidden vitkern_switch_stack
  .type vitkern_switch_stack, %function
vitkern_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
#endif

namespace emulator {

constexpr int kWarpLanes = 32;
constexpr size_t kStackBytes = 128 << 10;

enum class Waits { kForNothing, kForBlock, kForWarp, kEnded };

// What a lane brings to an operation of its warp, and what it takes away.
struct Meeting {
  const char* operation;
  unsigned mask;
  int source;  // the lane whose value is wanted; below 0: a bit from every lane
  uint64_t value;
};

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  void* top = nullptr;
  void* sanitizer_stack = nullptr;
  int index = 0;
  uint3 thread{};
  Waits waits = Waits::kForNothing;
  Meeting meeting{};
};

// The block that this OS thread runs. Fibers are kept for later blocks: a stack that AddressSanitizer has
// seen in use must not begin anew.
class Block {
 public:
  static Block& current() {
    static thread_local Block block;
    return block;
  }

  Fiber* fiber = nullptr;  // who runs now
  dim3 grid_dim, block_dim;
  uint3 index{};
  std::vector<char> dynamic_shared;

  void run(const char* kernel, dim3 grid, dim3 block, uint3 block_index, size_t shared_bytes,
           const std::function<void()>& body) {
    kernel_ = kernel, grid_dim = grid, block_dim = block, index = block_index, body_ = &body;
    // Exactly the size asked for, and NaN: overruns meet a red zone, and reading what nobody wrote shows.
    std::vector<char>(shared_bytes, '\xff').swap(dynamic_shared);
    threads_ = static_cast<int>(block.x * block.y * block.z);
    all_hold_ = true;
    waiting_.assign((threads_ + kWarpLanes - 1) / kWarpLanes, 0);
    while (static_cast<int>(fibers_.size()) < threads_) add_fiber();
    for (int i = 0; i < threads_; ++i) {
      const unsigned t = i;
      fibers_[i]->thread = {t % block.x, t / block.x % block.y, t / (block.x * block.y)};
      fibers_[i]->waits = Waits::kForNothing;
    }
    const char* order = std::getenv("CUDA_EMU_ORDER");
    const bool backwards = order && *order == '1';
    while (count(Waits::kEnded) < threads_) {
      bool progress = false;
      for (int i = 0; i < threads_; ++i) {
        Fiber& next = *fibers_[backwards ? threads_ - 1 - i : i];
        if (next.waits != Waits::kForNothing) continue;
        resume(next);
        progress = true;
      }
      if (count(Waits::kForBlock) == threads_) {
        held_ = std::exchange(all_hold_, true);
        for (int i = 0; i < threads_; ++i) fibers_[i]->waits = Waits::kForNothing;
      } else if (!progress) {
        abandon("deadlock: of " + std::to_string(threads_) + " threads " +
                std::to_string(count(Waits::kForBlock)) + " wait at __syncthreads, " +
                std::to_string(count(Waits::kForWarp)) + " in a warp operation, " +
                std::to_string(count(Waits::kEnded)) + " have ended");
      }
    }
  }

  // Whether the predicate holds for every thread of the block.
  bool sync_threads(bool predicate = true) {
    all_hold_ &= predicate;
    fiber->waits = Waits::kForBlock;
    yield();
    return held_;
  }

  // An operation of the lanes of `mask`: waits for all of them; the last to come serves the others.
  uint64_t meet(const char* operation, unsigned mask, uint64_t value, int source) {
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
    me.waits = Waits::kForWarp;

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
      other.waits = Waits::kForNothing;
    }
    return me.meeting.value;
  }

 private:
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
      block.fiber->waits = Waits::kEnded;
      block.yield();
    }
  }

  void resume(Fiber& next) {
    fiber = &next;
    void* own_sanitizer_stack = nullptr;
    __sanitizer_start_switch_fiber(&own_sanitizer_stack, next.stack.get(), kStackBytes);
    vitkern_switch_stack(&scheduler_top_, next.top);
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

  int count(Waits state) const {
    return static_cast<int>(std::count_if(fibers_.begin(), fibers_.begin() + threads_,
                                          [&](const auto& one) { return one->waits == state; }));
  }

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<unsigned> waiting_;  // for each warp, the lanes in a warp operation
  int threads_ = 0;
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
