// SPDX-License-Identifier: Apache-2.0
// Selects and launches the CUDA kernels of token_project.
#include "token_project/cuda.h"

#include <algorithm>

#include "common/dispatch.cuh"
#include "common/dispatch_rows.cuh"
#include "common/workspace.h"
#include "token_project/backward.cuh"
#include "token_project/forward.cuh"

namespace vitkern {
namespace {

// Backward's workspace. All parts but the first may take half of the size of x.
struct Layout {
  int64_t splits;
  Workspace workspace;
  void *shares, *f, *key, *tokens;

  Layout(const TokenProjectParams& p, void* memory) : workspace(memory) {
    const int64_t element = bytes(p.dtype), number = bytes(accumulator(p.dtype));
    const int64_t width = p.channels + p.keys, tiles = p.batch * tiles_of(p.token_count) * tiles_of(width);
    const int64_t of_split = 2 * p.token_count * width * number;
    splits = std::min({kBlocksWanted / std::max<int64_t>(tiles, 1), blocks_of(p.pixels, kColumns),
                       p.pixels * p.channels * element / std::max<int64_t>(of_split, 1)});
    splits = std::max<int64_t>(splits, 1);
    shares = workspace.take(p.batch * p.pixels * p.token_count * element);
    f = workspace.take(p.batch * p.pixels * p.token_count * element);
    key = workspace.take(p.batch * splits * p.token_count * p.keys * number);
    tokens = workspace.take(p.batch * splits * p.token_count * p.channels * number);
  }
};

// Calls `run` with the rows of a block, its shared memory and the number of blocks. Each row keeps `numbers`
// accumulators for a token, and one element of the type of x.
template <typename T, typename Call>
void dispatch(const TokenProjectParams& p, int numbers, const Call& call) {
  using A = Accumulator<T>;
  const int64_t row_bytes = numbers * SharedRows<A>::stride_of(p.token_count) * int64_t{sizeof(A)} +
                            SharedRows<T>::stride_of(p.token_count) * int64_t{sizeof(T)};
  dispatch_rows<T>("token_project: so many tokens", p.batch * p.pixels, row_bytes,
                   [&](auto rows, size_t shared) {
                     call(rows, shared, dim3(grid_blocks(p.batch * blocks_of(p.pixels, rows))));
                   });
}

// The gradients of keys, or of tokens, [B, T, columns].
template <typename T>
void sum_over_pixels(const TokenProjectParams& p, int64_t splits, const void* left, const void* right,
                     int64_t columns, void* parts, void* gradient) {
  if (!gradient || columns == 0) return;
  launch_row_sums<T>({p.batch, p.pixels, splits, p.token_count, columns, left, right, parts, nullptr},
                     p.stream);
  launch_add_parts<Accumulator<T>>(parts, p.batch, splits, p.token_count * columns, 1, nullptr, gradient,
                                   p.stream);
}

}  // namespace

void token_project_forward_cuda(const TokenProjectParams& p) {
  if (p.batch * p.pixels * p.channels == 0) return;
  const DeviceGuard guard(p.device);
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch<T>(p, 1, [&](auto rows, size_t shared, dim3 grid) {
      launch("token_project_forward", token_project_forward<T, rows>, grid, dim3(kBlockThreads), shared,
             p.stream, p);
    });
  });
}

int64_t token_project_workspace_cuda(const TokenProjectParams& p) {
  return Layout(p, nullptr).workspace.size();
}

void token_project_backward_cuda(const TokenProjectParams& p) {
  const DeviceGuard guard(p.device);
  const Layout layout(p, p.workspace);
  TokenProjectLeft left{};
  left.shares = p.grad_tokens ? layout.shares : nullptr;
  left.f = p.grad_key ? layout.f : nullptr;
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (p.batch * p.pixels && (p.grad_query || left.f || left.shares)) {
      dispatch<T>(p, 2, [&](auto rows, size_t shared, dim3 grid) {
        launch("token_project_backward", token_project_backward<T, rows>, grid, dim3(kBlockThreads), shared,
               p.stream, p, left);
      });
    }
    sum_over_pixels<T>(p, layout.splits, layout.f, p.query, p.keys, layout.key, p.grad_key);
    sum_over_pixels<T>(p, layout.splits, layout.shares, p.grad_output, p.channels, layout.tokens,
                       p.grad_tokens);
  });
}

}  // namespace vitkern
