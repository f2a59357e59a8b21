// SPDX-License-Identifier: Apache-2.0
// The instructions of common/tensor_cores.cuh, for the emulator: the lanes of a warp put their registers into a table
// that all of them read.
#pragma once

#include <array>

#include "emulator/cuda_emulator.h"

namespace emulator {

// The inputs of the caller's lanes to an operation, by lane. All lanes read them before the next are laid down.
template <typename Held>
const std::array<Held, kWarpLanes>& lay_down(const char* operation, const Held& held) {
  static thread_local std::array<std::array<Held, kWarpLanes>, 1024 / kWarpLanes> tables;
  const int index = Block::current().fiber->index;
  auto& table = tables[index / kWarpLanes];
  table[index % kWarpLanes] = held;
  Block::current().meet(operation, 0xffffffffu, 0, -1);
  return table;
}

inline void all_have_read(const char* operation) { Block::current().meet(operation, 0xffffffffu, 0, -1); }

inline float widened(__half x) { return __half2float(x); }
inline float widened(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
float half_of(uint32_t pair, int which) {
  return widened(T{static_cast<uint16_t>(pair >> 16 * which)});
}

}  // namespace emulator

namespace vitkern {

// ldmatrix.x4: lane l knows where row l % 8 of matrix l / 8 lies; all get two neighbours of each matrix.
template <bool kTransposed>
VITKERN_CALLED void load_matrices(uint32_t (&out)[4], const void* row) {
  const emulator::races::Recording none(false);
  const void* caller = VITKERN_CALLER;
  emulator::races::sees_row(row, caller);
  const auto& rows = emulator::lay_down("ldmatrix", static_cast<const uint16_t*>(row));
  const int lane = threadIdx.x % emulator::kWarpLanes;
  for (int i = 0; i < 4; ++i) {
    const int first = lane % 4 * 2, other = lane / 4;
    const auto at = [&](int r, int c) {
      const uint16_t* number = rows[8 * i + r] + c;
      emulator::races::sees(emulator::races::Access::kRead, number, sizeof *number, caller);
      return uint32_t{*number};
    };
    out[i] = kTransposed ? at(first, other) | at(first + 1, other) << 16
                         : at(other, first) | at(other, first + 1) << 16;
  }
  emulator::all_have_read("ldmatrix");
}

// Widened once, by the lane that holds them: 32 numbers are read from each place of the table.
struct EmulatedOperands {
  float a[8], b[4];
};

// mma.m16n8k16 with sums in float.
template <typename T>
void multiply_add_tile(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const emulator::races::Recording none(false);
  EmulatedOperands own;
  for (int i = 0; i < 8; ++i) own.a[i] = emulator::half_of<T>(a[i / 2], i % 2);
  for (int i = 0; i < 4; ++i) own.b[i] = emulator::half_of<T>(i / 2 ? b1 : b0, i % 2);
  const auto& held = emulator::lay_down("mma", own);
  const int lane = threadIdx.x % emulator::kWarpLanes;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, lower = i / 2, column = lane % 4 * 2 + i % 2;
    const EmulatedOperands *left = &held[4 * row], *right = &held[4 * column];
    for (int k = 0; k < 16; ++k) {
      const int pair = k % 8 / 2, upper = k / 8, half = k % 2;
      sums[i] += left[pair].a[2 * (2 * upper + lower) + half] * right[pair].b[2 * upper + half];
    }
  }
  emulator::all_have_read("mma");
}

// cp.async of 16 bytes, its groups, and cp.async.wait_all.
VITKERN_CALLED void copy_async(void* to, const void* from, bool wanted) {
  const emulator::races::Recording none(false);
  emulator::Block::current().may_switch();
  emulator::Block::current().copy(to, wanted ? from : nullptr, VITKERN_CALLER);
}

inline void commit_copies() {
  const emulator::races::Recording none(false);
  ++emulator::Block::current().fiber->groups;
}

// Waits for the caller's groups but the last kPending.
template <int kPending>
void wait_for_groups() {
  const emulator::races::Recording none(false);
  emulator::Block& block = emulator::Block::current();
  block.wait_for_groups_before(block.fiber->groups - kPending);
}

inline void wait_for_copies() {
  commit_copies();
  wait_for_groups<0>();
}

}  // namespace vitkern
