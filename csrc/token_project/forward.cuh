// SPDX-License-Identifier: Apache-2.0
// token_project forward, eqs. (1) and (2) of docs/derivations/token_project.md.
//
// Work split: a block takes kRows pixels of one image through both products; their logits and probabilities
// stay in shared memory.
// Memory: x and queries are read once, keys and tokens once a block through L2, the output is written once.
// Numerics: sums and softmax in the accumulator type; probabilities are rounded to the type of x before the
// second product, as in torch.
#pragma once

#include "common/block_product.cuh"
#include "token_project/params.h"

namespace vitkern {

// The pixels of a block. Blocks do not straddle images.
struct ProjectPlace {
  int64_t image, first;
};

template <int kRows>
__device__ __forceinline__ ProjectPlace project_place(const TokenProjectParams& p) {
  const int64_t blocks = (p.pixels + kRows - 1) / kRows, image = blockIdx.x / blocks;
  return {image, (blockIdx.x - image * blocks) * kRows};
}

// The matrix of one image in [B, rows, columns].
template <typename T>
__device__ __forceinline__ Matrix<T> of_image(const void* all, int64_t image, int64_t rows, int64_t columns) {
  return {static_cast<const T*>(all) + image * rows * columns, rows, columns};
}

// rows[kRows, T] = left right^T for the block's pixels: logits of queries and keys, or eq. (3).
template <int kRows, typename T>
__device__ __forceinline__ void by_token(const Matrix<T>& left, const Matrix<T>& right, int64_t first,
                                         const Stage<T, kRows>& stage,
                                         const SharedRows<Accumulator<T>>& rows) {
  using A = Accumulator<T>;
  for (int64_t token = 0; token < right.rows; token += kColumns) {
    Sums<A> sums[BlockTile<kRows>::kTiles] = {};
    block_product(Streamed<T, false>{left, first}, Streamed<T, false>{right, token}, left.columns, stage,
                  sums);
    for_pairs<kRows>(
        sums, [&](int row, int column, A one, A other) { rows.store_pair(row, token + column, one, other); });
  }
  __syncthreads();
}

// The lanes that share a pixel.
template <int kRows>
constexpr int kLanesOfRow = kBlockThreads / kRows;

// Softmax of the caller's row of logits, in place, eq. (1). All threads of the block must call it; each lane of a
// row takes its own columns: lane, lane + kLanesOfRow and so on.
template <int kRows, typename A>
__device__ __forceinline__ void softmax_row(A* logits, int64_t tokens) {
  constexpr int kLanes = kLanesOfRow<kRows>;
  const int lane = threadIdx.x % kLanes;
  A largest = -INFINITY, sum = 0;
  for (int64_t t = lane; t < tokens; t += kLanes) largest = fmax(largest, logits[t]);
  largest = team_reduce<kLanes>(largest, [](A one, A other) { return fmax(one, other); });
  for (int64_t t = lane; t < tokens; t += kLanes) {
    logits[t] = exp(logits[t] - largest);
    sum += logits[t];
  }
  sum = team_reduce<kLanes>(sum, [](A one, A other) { return one + other; });
  for (int64_t t = lane; t < tokens; t += kLanes) logits[t] /= sum;
}

template <typename T, int kRows>
__global__ void __launch_bounds__(kBlockThreads, 2)
    token_project_forward(const __grid_constant__ TokenProjectParams p) {
  using A = Accumulator<T>;
  constexpr int kVector = kVectorBytes / sizeof(T), kLanes = kLanesOfRow<kRows>;
  VITKERN_DYNAMIC_SHARED(unsigned char, bytes);
  const Stage<T, kRows> stage{bytes};
  const int64_t stride = SharedRows<A>::stride_of(p.token_count);
  const SharedRows<A> logits{reinterpret_cast<A*>(bytes + stage.kBytes), static_cast<int>(stride)};
  const SharedRows<T> shares{reinterpret_cast<T*>(logits.at + kRows * stride),
                             static_cast<int>(SharedRows<T>::stride_of(p.token_count))};
  const ProjectPlace place = project_place<kRows>(p);
  const Matrix<T> x = of_image<T>(p.x, place.image, p.pixels, p.channels);
  const Matrix<T> tokens = of_image<T>(p.tokens, place.image, p.token_count, p.channels);

  by_token(of_image<T>(p.query, place.image, p.pixels, p.keys),
           of_image<T>(p.key, place.image, p.token_count, p.keys), place.first, stage, logits);
  const int row = threadIdx.x / kLanes;
  softmax_row<kRows>(logits.at + row * logits.stride, p.token_count);
  for (int t = threadIdx.x % kLanes; t < shares.stride; t += kLanes)
    shares.at[row * shares.stride + t] =
        narrow<T>(t < p.token_count ? logits.at[row * logits.stride + t] : A{0});

  T* output = static_cast<T*>(p.output) + place.image * p.pixels * p.channels;
  const bool vectors = x.vectors && aligned(output);
  for (int64_t channel = 0; channel < p.channels; channel += kColumns) {
    Sums<A> sums[BlockTile<kRows>::kTiles] = {};
    block_product(shares.factor(), Streamed<T, true>{tokens, channel}, p.token_count, stage, sums);
    for_rows<kRows, T>(sums, stage, [&](int row, int column, A(&y)[kVector]) {
      const int64_t n = place.first + row, c = channel + column;
      if (n >= p.pixels) return;
      A before[kVector];
      load_part(x.at + n * p.channels, c, p.channels, x.vectors, before);
#pragma unroll
      for (int i = 0; i < kVector; ++i) y[i] += before[i];
      store_part(output + n * p.channels, c, p.channels, vectors, y);
    });
  }
}

}  // namespace vitkern
