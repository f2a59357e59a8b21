// SPDX-License-Identifier: Apache-2.0
// Selects and launches the CUDA kernels of adapter_bottleneck.
#include "adapter_bottleneck/cuda.h"

#include <algorithm>

#include "adapter_bottleneck/backward.cuh"
#include "adapter_bottleneck/forward.cuh"
#include "common/dispatch.cuh"
#include "common/dispatch_rows.cuh"
#include "common/workspace.h"

namespace vitkern {
namespace {

// Backward's workspace. The partial products may take half of x's size.
struct Layout {
  int64_t splits;
  Workspace workspace;
  void *a, *f, *scale_part, *down, *down_bias, *up, *up_bias;

  Layout(const AdapterBottleneckParams& p, void* memory) : workspace(memory) {
    const int64_t element = bytes(p.dtype), number = bytes(accumulator(p.dtype));
    const int64_t tiles = 2 * tiles_of(p.hidden) * tiles_of(p.channels);
    splits = std::min({kBlocksWanted / std::max<int64_t>(tiles, 1), blocks_of(p.rows, kColumns),
                       p.rows * element / (4 * std::max<int64_t>(p.hidden, 1) * number)});
    splits = std::max<int64_t>(splits, 1);
    a = workspace.take(p.rows * p.hidden * element);
    f = workspace.take(p.rows * p.hidden * element);
    scale_part = workspace.take(blocks_of(p.rows, kFewestRows) * number);
    down = workspace.take(splits * p.hidden * p.channels * number);
    down_bias = workspace.take(splits * p.hidden * number);
    up = workspace.take(splits * p.channels * p.hidden * number);
    up_bias = workspace.take(splits * p.channels * number);
  }
};

// Calls `run` with the rows of a block and its shared memory.
template <typename T, typename Call>
void dispatch(const AdapterBottleneckParams& p, const Call& call) {
  const int64_t hidden_bytes = SharedRows<T>::stride_of(p.hidden) * int64_t{sizeof(T)};
  dispatch_rows<T>("adapter_bottleneck: so many hidden units", p.rows, hidden_bytes, call);
}

template <typename T>
void sum_over_rows(const AdapterBottleneckParams& p, const Layout& layout) {
  using A = Accumulator<T>;
  RowSums down{1, p.rows, layout.splits, p.hidden, p.channels, layout.f, p.x, nullptr, nullptr};
  down.products = p.grad_down_weight && p.channels ? layout.down : nullptr;
  down.column_sums = p.grad_down_bias ? layout.down_bias : nullptr;
  if (down.products || down.column_sums) launch_row_sums<T>(down, p.stream);
  RowSums up{1, p.rows, layout.splits, p.channels, p.hidden, p.grad_output, layout.a, nullptr, nullptr};
  up.products = p.grad_up_weight ? layout.up : nullptr;
  up.column_sums = p.grad_up_bias || (p.grad_scale && p.up_bias) ? layout.up_bias : nullptr;
  if (up.products || up.column_sums) launch_row_sums<T>(up, p.stream);

  const int64_t weights = p.hidden * p.channels;
  launch_add_parts<A>(layout.down, 1, layout.splits, weights, 1, nullptr, p.grad_down_weight, p.stream);
  launch_add_parts<A>(layout.down_bias, 1, layout.splits, p.hidden, 1, nullptr, p.grad_down_bias, p.stream);
  launch_add_parts<A>(layout.up, 1, layout.splits, weights, p.factor, p.scale, p.grad_up_weight, p.stream);
  launch_add_parts<A>(layout.up_bias, 1, layout.splits, p.channels, p.factor, p.scale, p.grad_up_bias,
                      p.stream);
}

}  // namespace

void adapter_bottleneck_forward_cuda(const AdapterBottleneckParams& p) {
  if (p.rows * std::max(p.channels, p.hidden) == 0) return;
  const DeviceGuard guard(p.device);
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch<T>(p, [&](auto rows, size_t shared) {
      launch("adapter_bottleneck_forward", adapter_bottleneck_forward<T, rows>,
             dim3(grid_blocks(blocks_of(p.rows, rows))), dim3(kBlockThreads), shared, p.stream, p);
    });
  });
}

int64_t adapter_bottleneck_workspace_cuda(const AdapterBottleneckParams& p) {
  return Layout(p, nullptr).workspace.size();
}

void adapter_bottleneck_backward_cuda(const AdapterBottleneckParams& p) {
  const DeviceGuard guard(p.device);
  const Layout layout(p, p.workspace);
  AdapterBottleneckLeft left{};
  left.a = p.grad_up_weight ? layout.a : nullptr;
  left.f = p.grad_down_weight || p.grad_down_bias ? layout.f : nullptr;
  left.scale_part = p.grad_scale ? layout.scale_part : nullptr;
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    int64_t parts = 0;
    if (p.rows && (p.grad_x || left.a || left.f || left.scale_part)) {
      dispatch<T>(p, [&](auto rows, size_t shared) {
        parts = blocks_of(p.rows, rows);
        launch("adapter_bottleneck_backward", adapter_bottleneck_backward<T, rows>, dim3(grid_blocks(parts)),
               dim3(kBlockThreads), shared, p.stream, p, left);
      });
    }
    sum_over_rows<T>(p, layout);
    if (p.grad_scale)
      launch("adapter_bottleneck_grad_scale", adapter_bottleneck_grad_scale<T>, dim3(1), dim3(kBlockThreads),
             0, p.stream, p, layout.scale_part, parts, layout.up_bias, layout.splits);
  });
}

}  // namespace vitkern
