// SPDX-License-Identifier: Apache-2.0
// Selects and launches the CUDA kernels of token_pool.
#include "token_pool/cuda.h"

#include <algorithm>
#include <type_traits>

#include "common/dispatch.cuh"
#include "common/row_sums.cuh"
#include "common/workspace.h"
#include "token_pool/backward.cuh"
#include "token_pool/forward.cuh"

namespace vitkern {
namespace {

// The workspace of either pass. With few images, each image's pixels are split into parts, up to a quarter of x
// in size.
struct Layout {
  int64_t splits;
  Workspace workspace;
  TokenPoolTask task;

  Layout(const TokenPoolParams& p, bool backward, void* memory) : workspace(memory) {
    const int64_t element = bytes(p.dtype), number = bytes(accumulator(p.dtype));
    splits = std::min({kBlocksWanted / std::max<int64_t>(p.batch, 1), int64_t{kBlockThreads},
                       p.pixels * element / (4 * std::max<int64_t>(p.tokens, 1) * number)});
    splits = std::max<int64_t>(splits, 1);
    const int64_t tokens = p.batch * splits * p.tokens;
    task.p = p;
    task.splits = splits;
    task.largest = backward ? nullptr : workspace.take(tokens * number);
    task.sums = backward ? nullptr : workspace.take(tokens * number);
    task.parts = workspace.take(tokens * p.channels * number);
  }
};

// Calls `run` with a block's strips of 16 tokens and its window of channels. A wide window reads pixels of many
// channels once. More tokens leave fewer registers for it, and backward leaves less shared memory.
template <typename T, bool kBackward, typename Call>
void dispatch_tile(const TokenPoolParams& p, const Call& call) {
  constexpr int kUsual = sizeof(T) == 8 ? 128 : 256;
  constexpr int kWide = kBackward        ? (sizeof(T) == 2 ? 512 : kUsual)
                        : sizeof(T) == 8 ? kUsual
                                         : 2048 / sizeof(T);
  constexpr int kOfManyTokens = (kBackward ? 256 : 512) / sizeof(T);
  if (p.tokens > kStrip)
    return call(std::integral_constant<int, 4>{}, std::integral_constant<int, kOfManyTokens>{});
  if (p.channels > kUsual)
    return call(std::integral_constant<int, 1>{}, std::integral_constant<int, kWide>{});
  call(std::integral_constant<int, 1>{}, std::integral_constant<int, kUsual>{});
}

}  // namespace

int64_t token_pool_forward_workspace_cuda(const TokenPoolParams& p) {
  return Layout(p, false, nullptr).workspace.size();
}

int64_t token_pool_backward_workspace_cuda(const TokenPoolParams& p) {
  return Layout(p, true, nullptr).workspace.size();
}

void token_pool_forward_cuda(const TokenPoolParams& p) {
  if (p.batch * p.tokens == 0) return;
  const DeviceGuard guard(p.device);
  const TokenPoolTask task = Layout(p, false, p.workspace).task;
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_tile<T, false>(p, [&](auto strips, auto window) {
      using Tile = PoolTile<T, strips, window>;
      const int64_t blocks =
          p.batch * task.splits * blocks_of(p.tokens, Tile::kTokens) * windows_of(p.channels, window);
      launch("token_pool_forward", token_pool_forward<T, strips, window>, dim3(grid_blocks(blocks)),
             dim3(kBlockThreads), PoolForwardShared<Tile>::kBytes, p.stream, task);
    });
    launch("token_pool_merge", token_pool_merge<T>, dim3(grid_blocks(p.batch * p.tokens)),
           dim3(kBlockThreads), 0, p.stream, task);
  });
}

void token_pool_backward_cuda(const TokenPoolParams& p) {
  const DeviceGuard guard(p.device);
  if (p.tokens == 0 && p.grad_x && p.batch * p.pixels * p.channels)
    return check_cuda(cudaMemsetAsync(p.grad_x, 0, p.batch * p.pixels * p.channels * bytes(p.dtype),
                                      static_cast<cudaStream_t>(p.stream)),
                      "cudaMemsetAsync");
  const TokenPoolTask task = Layout(p, true, p.workspace).task;
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulator<T>;
    dispatch_tile<T, true>(p, [&](auto strips, auto window) {
      using Tile = PoolTile<T, strips, window>;
      const int64_t blocks = p.batch * task.splits * windows_of(p.channels, window);
      if (blocks == 0 || !(p.grad_x || p.grad_weight)) return;
      launch("token_pool_backward", token_pool_backward<T, strips, window>, dim3(grid_blocks(blocks)),
             dim3(kBlockThreads), PoolBackwardShared<Tile>::kBytes, p.stream, task);
    });
    const int64_t images = p.weight_per_image ? p.batch : 1, splits = p.weight_per_image ? 1 : p.batch;
    launch_add_parts<A>(task.parts, images, splits * task.splits, p.tokens * p.channels, 1, nullptr,
                        p.grad_weight, p.stream);
  });
}

}  // namespace vitkern
