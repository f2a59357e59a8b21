// SPDX-License-Identifier: Apache-2.0
// adapter_bottleneck backward, eqs. (6) to (11) of docs/derivations/adapter_bottleneck.md.
//
// Work split: adapter_bottleneck_backward takes a block of kRows rows, computes z again, then e, a and f, writes
// a and f to the workspace [N, H], and grad_x. row_sums computes the gradients of the weights from a, f, x and
// grad_output; adapter_bottleneck_grad_scale adds up eq. (11).
// Memory: each kernel reads x and grad_output once; only grad_x is written at the size of x.
// Numerics: a and f are rounded to the type of x, as in torch; all sums are in the accumulator type.
// No atomics: parts are added in a fixed order.
#pragma once

#include "adapter_bottleneck/hidden.cuh"
#include "common/row_sums.cuh"

namespace vitkern {

// The workspace that passes results between the kernels.
struct AdapterBottleneckLeft {
  void *a, *f;       // [N, H], type of x; null if not needed
  void* scale_part;  // [blocks], accumulator type: sums of a e; null if grad_scale is not needed
};

// The sum of the threads' numbers. All threads of the block must call it; `warps` has room for kBlockWarps.
template <typename A>
__device__ __forceinline__ A block_sum(A x, A* warps) {
  x = team_reduce<kWarpLanes>(x, [](A left, A right) { return left + right; });
  __syncthreads();
  if (threadIdx.x % kWarpLanes == 0) warps[threadIdx.x / kWarpLanes] = x;
  __syncthreads();
  x = 0;
#pragma unroll
  for (int warp = 0; warp < kBlockWarps; ++warp) x += warps[warp];
  return x;
}

// Computes a and f of the hidden units from `unit` on, in shared memory and the workspace; returns the caller's
// part of the sum of a e. If z was not kept, the argument z has no bias.
template <typename T, int kRows>
__device__ __forceinline__ Accumulator<T> hidden_gradients(
    const AdapterBottleneckParams& p, const AdapterBottleneckLeft& left, int64_t first_row, int64_t unit,
    Accumulator<T> scale, Sums<Accumulator<T>> (&z)[BlockTile<kRows>::kTiles],
    Sums<Accumulator<T>> (&e)[BlockTile<kRows>::kTiles], const SharedRows<T>& hidden) {
  using A = Accumulator<T>;
  A sum = 0;
  int pair = 0;
  for_pairs<kRows>(z, [&](int row, int column, A first, A second) {
    const Sums<A>& of_e = e[pair / 2];
    const A z_pair[] = {first, second}, e_pair[] = {of_e.at[pair % 2 * 2], of_e.at[pair % 2 * 2 + 1]};
    ++pair;
    const int64_t h = unit + column, index = (first_row + row) * p.hidden + h;
    A f[2] = {0, 0};
    if (first_row + row < p.rows && h < p.hidden) {
      const PairOfFactors<A> factors = dropout_factors<A>(p.dropout, index);
      const A d[] = {factors.first, factors.second};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (h + i >= p.hidden) break;
        const A at = p.kept ? static_cast<const A*>(p.kept)[index + i]
                            : z_pair[i] + number_or_zero<T>(p.down_bias, h + i);
        const A a = activate(p.activation, at) * d[i];
        f[i] = activate_backward(p.activation, at, scale * e_pair[i] * d[i]);
        sum += a * e_pair[i];
        if (left.a) static_cast<T*>(left.a)[index + i] = narrow<T>(a);
        if (left.f) static_cast<T*>(left.f)[index + i] = narrow<T>(f[i]);
      }
    }
    hidden.store_pair(row, h, f[0], f[1]);
  });
  return sum;
}

// Eq. (8) for the block's rows, with f in shared memory.
template <typename T, int kRows>
__device__ __forceinline__ void write_grad_x(const AdapterBottleneckParams& p, int64_t first_row,
                                             const SharedRows<T>& f, const Stage<T, kRows>& stage) {
  using A = Accumulator<T>;
  constexpr int kVector = kVectorBytes / sizeof(T);
  const Matrix<T> down(p.down_weight, p.hidden, p.channels), grad_x(p.grad_x, p.rows, p.channels);
  const Matrix<T> grad_output(p.grad_output, p.rows, p.channels);
  for (int64_t channel = 0; channel < p.channels; channel += kColumns) {
    Sums<A> sums[BlockTile<kRows>::kTiles] = {};
    block_product(f.factor(), Streamed<T, true>{down, channel}, p.hidden, stage, sums);
    for_rows<kRows, T>(sums, stage, [&](int row, int column, A(&grad)[kVector]) {
      const int64_t n = first_row + row, c = channel + column;
      if (n >= p.rows) return;
      if (p.residual_is_x) {
        A of_residual[kVector];
        load_part(grad_output.at + n * p.channels, c, p.channels, grad_output.vectors, of_residual);
#pragma unroll
        for (int i = 0; i < kVector; ++i) grad[i] += of_residual[i];
      }
      store_part(static_cast<T*>(p.grad_x) + n * p.channels, c, p.channels, grad_x.vectors, grad);
    });
  }
}

template <typename T, int kRows>
__global__ void __launch_bounds__(kBlockThreads, 2)
    adapter_bottleneck_backward(const __grid_constant__ AdapterBottleneckParams p,
                                const __grid_constant__ AdapterBottleneckLeft left) {
  using A = Accumulator<T>;
  VITKERN_DYNAMIC_SHARED(unsigned char, bytes);
  const Stage<T, kRows> stage{bytes};
  const SharedRows<T> f{reinterpret_cast<T*>(bytes + stage.kBytes),
                        static_cast<int>(SharedRows<T>::stride_of(p.hidden))};
  const int64_t first_row = int64_t{blockIdx.x} * kRows;
  const Matrix<T> x(p.x, p.rows, p.channels), grad_output(p.grad_output, p.rows, p.channels);
  const Matrix<T> down(p.down_weight, p.hidden, p.channels), up(p.up_weight, p.channels, p.hidden);
  const A scale = scale_of<A>(p);

  A sum = 0;
  for (int64_t unit = 0; unit < p.hidden; unit += kColumns) {
    Sums<A> z[BlockTile<kRows>::kTiles] = {}, e[BlockTile<kRows>::kTiles] = {};
    if (!p.kept)
      block_product(Streamed<T, false>{x, first_row}, Streamed<T, false>{down, unit}, p.channels, stage, z);
    if (p.grad_x || left.f || left.scale_part)
      block_product(Streamed<T, false>{grad_output, first_row}, Streamed<T, true>{up, unit}, p.channels,
                    stage, e);
    sum += hidden_gradients<T, kRows>(p, left, first_row, unit, scale, z, e, f);
  }
  if (p.grad_x) write_grad_x<T, kRows>(p, first_row, f, stage);
  if (left.scale_part) {
    sum = block_sum(sum, reinterpret_cast<A*>(stage.bytes));
    if (threadIdx.x == 0) static_cast<A*>(left.scale_part)[blockIdx.x] = sum;
  }
}

// Eq. (11), in one block: adds the sums of a e from `count` blocks and the bias's share, which comes from the sums
// of grad_output's columns in `splits` parts.
template <typename T>
__global__ void __launch_bounds__(kBlockThreads)
    adapter_bottleneck_grad_scale(const __grid_constant__ AdapterBottleneckParams p, const void* scale_part,
                                  int64_t count, const void* column_sums, int64_t splits) {
  using A = Accumulator<T>;
  __shared__ A warps[kBlockWarps];
  const A* parts = static_cast<const A*>(scale_part);
  const A* columns = static_cast<const A*>(column_sums);
  A sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kBlockThreads) sum += parts[i];
  if (p.up_bias) {
    for (int64_t c = threadIdx.x; c < p.channels; c += kBlockThreads) {
      A column = 0;
      for (int64_t split = 0; split < splits; ++split) column += columns[split * p.channels + c];
      sum += number_or_zero<T>(p.up_bias, c) * column;
    }
  }
  sum = block_sum(sum, warps);
  if (threadIdx.x == 0) *static_cast<A*>(p.grad_scale) = static_cast<A>(p.factor) * sum;
}

}  // namespace vitkern
