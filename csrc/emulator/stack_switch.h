// SPDX-License-Identifier: Apache-2.0
// The switch from one stack to another: saves what a call must preserve, exchanges stacks, returns on the other.
#pragma once

#if !defined(__ELF__) || !(defined(__x86_64__) || defined(__aarch64__))
#error "the CUDA emulator switches stacks in assembly, written for x86-64 and aarch64 with ELF only"
#endif

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#else
inline void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif

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
