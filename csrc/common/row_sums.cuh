// SPDX-License-Identifier: Apache-2.0
// Products of two matrices over their rows, as gradients of weights are: out[i, j] = sum over n of left[n, i]
// right[n, j], and of the left one's columns. The same bits at each run.
//
// Work split: a block makes 64 x 64 of the sums over one of `splits` runs of rows of one image and leaves them
// in the workspace; add_parts adds the runs up in their order.
#pragma once

#include "common/block_product.cuh"

namespace vitkern {

struct RowSums {
  int64_t images, rows, splits;
  int64_t left_columns, right_columns;
  const void *left, *right;  // [images, rows, columns]
  void* products;            // [images, splits, left_columns, right_columns], accumulator type, or null
  void* column_sums;         // [images, splits, left_columns], accumulator type, or null
};

__host__ __device__ constexpr int64_t tiles_of(int64_t extent) { return (extent + kColumns - 1) / kColumns; }

// Adds up the columns of the left factor's chunks, one a thread.
template <typename T>
struct ColumnSums {
  Accumulator<T>* sum;
  bool wanted;

  __device__ __forceinline__ void operator()(const T* chunk) const {
    if (!wanted || threadIdx.x >= kColumns) return;
#pragma unroll 8
    for (int k = 0; k < kChunk<T>; ++k) *sum += widen(chunk[k * (kColumns + kRowPad<T>)+threadIdx.x]);
  }
};

template <typename T>
__global__ void __launch_bounds__(kBlockThreads, 2) row_sums(const __grid_constant__ RowSums task) {
  using A = Accumulator<T>;
  VITKERN_DYNAMIC_SHARED(unsigned char, bytes);
  const Stage<T, kColumns> stage{bytes};
  const int64_t tiles_right = task.products ? tiles_of(task.right_columns) : 1;
  int64_t block = blockIdx.x;
  const int64_t column = block % tiles_right * kColumns;
  block /= tiles_right;
  const int64_t row = block % tiles_of(task.left_columns) * kColumns,
                part = block / tiles_of(task.left_columns);
  const int64_t image = part / task.splits, split = part - image * task.splits;
  const int64_t run = (task.rows + task.splits - 1) / task.splits;
  const int64_t begin = min(split * run, task.rows), end = min(begin + run, task.rows);
  const int64_t before = image * task.rows + begin;  // rows

  A column_sum = 0;
  Sums<A> sums[BlockTile<kColumns>::kTiles] = {};
  const ColumnSums<T> with_left{&column_sum, task.column_sums && column == 0};
  const Streamed<T, true> left{
      {static_cast<const T*>(task.left) + before * task.left_columns, end - begin, task.left_columns}, row};
  const Streamed<T, true> right{
      {static_cast<const T*>(task.right) + before * task.right_columns, end - begin, task.right_columns},
      column};
  block_product<kColumns>(left, right, end - begin, stage, sums, with_left);

  if (with_left.wanted && threadIdx.x < kColumns && row + threadIdx.x < task.left_columns)
    static_cast<A*>(task.column_sums)[part * task.left_columns + row + threadIdx.x] = column_sum;
  if (!task.products) return;
  for_pairs<kColumns>(sums, [&](int i, int j, A first, A second) {
    if (row + i >= task.left_columns) return;
    A* at = static_cast<A*>(task.products) + (part * task.left_columns + row + i) * task.right_columns +
            column + j;
    if (column + j < task.right_columns) at[0] = first;
    if (column + j + 1 < task.right_columns) at[1] = second;
  });
}

// out[image, i] = factor * scale * the sum of parts[image, split, i] in the order of the splits.
template <typename A>
__global__ void __launch_bounds__(kBlockThreads) add_parts(const A* parts, int64_t images, int64_t splits,
                                                           int64_t count, A factor, const A* scale, A* out) {
  const int64_t index = int64_t{blockIdx.x} * kBlockThreads + threadIdx.x;
  if (index >= images * count) return;
  const int64_t image = index / count, i = index - image * count;
  const A* part = parts + image * splits * count + i;
  A sum = 0;
#pragma unroll 4
  for (int64_t split = 0; split < splits; ++split) sum += part[split * count];
  out[index] = sum * (scale ? factor * *scale : factor);
}

template <typename T>
void launch_row_sums(const RowSums& task, void* stream) {
  const int64_t tiles = tiles_of(task.left_columns) * (task.products ? tiles_of(task.right_columns) : 1);
  if (task.images * task.splits * tiles == 0) return;
  launch("row_sums", row_sums<T>, dim3(grid_blocks(task.images * task.splits * tiles)), dim3(kBlockThreads),
         Stage<T, kColumns>::kBytes, stream, task);
}

template <typename A>
void launch_add_parts(const void* parts, int64_t images, int64_t splits, int64_t count, double factor,
                      const void* scale, void* out, void* stream) {
  if (!out || images * count == 0) return;
  launch("add_parts", add_parts<A>, dim3(grid_blocks(blocks_of(images * count, kBlockThreads))),
         dim3(kBlockThreads), 0, stream, static_cast<const A*>(parts), images, splits, count,
         static_cast<A>(factor), static_cast<const A*>(scale), static_cast<A*>(out));
}

}  // namespace vitkern
