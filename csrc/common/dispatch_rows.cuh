// SPDX-License-Identifier: Apache-2.0
// How many rows a block takes, for kernels made of block products.
#pragma once

#include <string>
#include <type_traits>

#include "common/block_product.cuh"

namespace vitkern {

constexpr int64_t kBlocksAtLeast = 256;  // two for each SM
constexpr int kFewestRows = 16;          // of a block

// Calls with the rows of a block and its shared memory: many where there are enough blocks even so, for they share
// one reading of the weights, as long as the `row_bytes` that each row keeps in shared memory fit. Doubles, which
// serve to check gradients, have one size.
template <typename T, typename Call>
void dispatch_rows(const char* refusal, int64_t rows, int64_t row_bytes, const Call& call) {
  const auto called = [&](auto of_block) {
    const size_t shared = Stage<T, of_block>::kBytes + of_block * row_bytes;
    if (shared > most_shared_bytes()) return false;
    call(of_block, shared);
    return true;
  };
  if constexpr (std::is_same_v<T, double>) {
    if (called(std::integral_constant<int, kFewestRows>{})) return;
  } else {
    if (rows >= 64 * kBlocksAtLeast && called(std::integral_constant<int, 64>{})) return;
    if (called(std::integral_constant<int, 32>{})) return;
  }
  throw std::runtime_error(std::string("vitkern: ") + refusal + " do not fit this card's shared memory");
}

}  // namespace vitkern
