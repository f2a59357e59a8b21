// SPDX-License-Identifier: Apache-2.0
// adapter_bottleneck forward, eqs. (1) to (3) of docs/derivations/adapter_bottleneck.md.
//
// Work split: a block computes both products of kRows rows; its hidden units stay in shared memory.
// Memory: x is read from global memory once (again through L2 for each further 64 hidden units, and if it is
// the residual); each block reads the weights once through L2; the output is written once, 16 bytes a thread.
// Numerics: sums, biases, activation and residual in the accumulator type; hidden units are rounded to the
// type of x before the second product, as in torch.
#pragma once

#include "adapter_bottleneck/hidden.cuh"

namespace vitkern {

// a of eq. (2) for the hidden units of the block's rows, from `unit` on.
template <typename T, int kRows>
__device__ __forceinline__ void keep_hidden(const AdapterBottleneckParams& p, int64_t first_row, int64_t unit,
                                            Sums<Accumulator<T>> (&z)[BlockTile<kRows>::kTiles],
                                            const SharedRows<T>& hidden) {
  using A = Accumulator<T>;
  for_pairs<kRows>(z, [&](int row, int column, A first, A second) {
    const int64_t h = unit + column, index = (first_row + row) * p.hidden + h;
    A a[2] = {0, 0};
    if (first_row + row < p.rows && h < p.hidden) {
      const PairOfFactors<A> d = dropout_factors<A>(p.dropout, index);
      const bool both = h + 1 < p.hidden;
      first += number_or_zero<T>(p.down_bias, h);
      if (both) second += number_or_zero<T>(p.down_bias, h + 1);
      a[0] = activate(p.activation, first) * d.first;
      if (both) a[1] = activate(p.activation, second) * d.second;
      if (p.kept) {
        static_cast<A*>(p.kept)[index] = first;
        if (both) static_cast<A*>(p.kept)[index + 1] = second;
      }
    }
    hidden.store_pair(row, h, a[0], a[1]);
  });
}

template <typename T, int kRows>
__global__ void __launch_bounds__(kBlockThreads, 2)
    adapter_bottleneck_forward(const __grid_constant__ AdapterBottleneckParams p) {
  using A = Accumulator<T>;
  constexpr int kVector = kVectorBytes / sizeof(T);
  VITKERN_DYNAMIC_SHARED(unsigned char, bytes);
  const Stage<T, kRows> stage{bytes};
  const SharedRows<T> hidden{reinterpret_cast<T*>(bytes + stage.kBytes),
                             static_cast<int>(SharedRows<T>::stride_of(p.hidden))};
  const int64_t first_row = int64_t{blockIdx.x} * kRows;
  const Matrix<T> x(p.x, p.rows, p.channels), output(p.output, p.rows, p.channels);
  const Matrix<T> down(p.down_weight, p.hidden, p.channels), up(p.up_weight, p.channels, p.hidden);

  for (int64_t unit = 0; unit < p.hidden; unit += kColumns) {
    Sums<A> z[BlockTile<kRows>::kTiles] = {};
    block_product(Streamed<T, false>{x, first_row}, Streamed<T, false>{down, unit}, p.channels, stage, z);
    keep_hidden<T, kRows>(p, first_row, unit, z, hidden);
  }

  const A scale = scale_of<A>(p);
  const Matrix<T> residual(p.residual_is_x ? p.x : p.residual, p.rows, p.channels);
  for (int64_t channel = 0; channel < p.channels; channel += kColumns) {
    Sums<A> sums[BlockTile<kRows>::kTiles] = {};
    block_product(hidden.factor(), Streamed<T, false>{up, channel}, p.hidden, stage, sums);
    for_rows<kRows, T>(sums, stage, [&](int row, int column, A(&y)[kVector]) {
      const int64_t n = first_row + row, c = channel + column;
      if (n >= p.rows) return;
      A bias[kVector] = {}, before[kVector] = {};
      if (p.up_bias) {
        const T* up_bias = static_cast<const T*>(p.up_bias);
        load_part(up_bias, c, p.channels, aligned(up_bias) && up.rows % kVector == 0, bias);
      }
      if (residual.at) load_part(residual.at + n * p.channels, c, p.channels, residual.vectors, before);
#pragma unroll
      for (int i = 0; i < kVector; ++i) y[i] = before[i] + scale * (y[i] + bias[i]);
      store_part(static_cast<T*>(p.output) + n * p.channels, c, p.channels, output.vectors, y);
    });
  }
}

}  // namespace vitkern
