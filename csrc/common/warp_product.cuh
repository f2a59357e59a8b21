// SPDX-License-Identifier: Apache-2.0
// The product of two matrices in shared memory by one warp: tensor cores for 16 bits, multiply-adds for the
// others, with the same lane holding the same sums.
#pragma once

#include "common/tensor_cores.cuh"
#include "common/vec.cuh"
#include "common/warp.cuh"

namespace vitkern {

constexpr int kStrip = 16;       // rows of a warp's tile
constexpr int kTileColumns = 8;  // its columns, and as many more for each further tile
constexpr int kDepthStep = 16;   // depths are padded to multiples of it

// A lane's part of a tile of sums. Floats of 32 bits stand for products of 32-bit floats, never of tf32: that
// is for torch's user to allow, who has not been asked.
template <typename A>
struct Sums {
  A at[4];
};

// Where number i of Sums lies in the tile, as in PTX's mma.m16n8: 0 and 1 are neighbours in a row, so are 2
// and 3.
__device__ __forceinline__ int row_of_sum(int i) { return threadIdx.x % kWarpLanes / 4 + i / 2 * 8; }
__device__ __forceinline__ int column_of_sum(int i) { return threadIdx.x % 4 * 2 + i % 2; }

// A factor in shared memory: i counts rows of the left one or columns of the right one, k runs along the depth
// of the sums. Stored [i, k], or [k, i] if kAcross. Rows are 16-byte aligned; an odd number of 16 bytes to a
// row keeps its neighbours in other banks.
template <typename T, bool kAcross>
struct Factor {
  const T* at;
  int stride;

  __device__ __forceinline__ const T* address(int i, int k) const {
    return at + (kAcross ? k * stride + i : i * stride + k);
  }
  __device__ __forceinline__ Factor from(int i, int k) const { return {address(i, k), stride}; }
};

// Numbers to pad a row of a multiple of 8 with, so that its stride is odd in units of 16 bytes.
template <typename T>
constexpr int kRowPad = kVectorBytes / int{sizeof(T)};

template <int kTiles, typename T, bool kAcrossLeft, bool kAcrossRight>
__device__ __forceinline__ void tensor_multiply_add(const Factor<T, kAcrossLeft>& left,
                                                    const Factor<T, kAcrossRight>& right, int depth,
                                                    Sums<float> (&sums)[kTiles]) {
  static_assert(kTiles % 2 == 0, "columns are loaded for two tiles at a time");
  const int lane = threadIdx.x % kWarpLanes;
  const int low = lane % 8, middle = lane / 8 % 2 * 8, high = lane / 16 * 8;
#pragma unroll 4
  for (int k = 0; k < depth; k += kDepthStep) {
    uint32_t a[4];
    load_matrices<kAcrossLeft>(
        a, kAcrossLeft ? left.address(middle, k + low + high) : left.address(low + middle, k + high));
#pragma unroll
    for (int tile = 0; tile < kTiles; tile += 2) {
      uint32_t b[4];
      const int column = tile * kTileColumns;
      load_matrices<kAcrossRight>(b, kAcrossRight ? right.address(column + high, k + low + middle)
                                                  : right.address(column + low + high, k + middle));
      multiply_add_tile<T>(sums[tile].at, a, b[0], b[1]);
      multiply_add_tile<T>(sums[tile + 1].at, a, b[2], b[3]);
    }
  }
}

// kStep numbers along the depth, at once where they are neighbours.
template <int kStep, typename T, bool kAcross>
__device__ __forceinline__ void read_depth(const Factor<T, kAcross>& factor, int i, int k, T (&out)[kStep]) {
  if constexpr (kAcross) {
#pragma unroll
    for (int j = 0; j < kStep; ++j) out[j] = *factor.address(i, k + j);
  } else {
    const auto vector = *reinterpret_cast<const Vector<T, kStep>*>(factor.address(i, k));
#pragma unroll
    for (int j = 0; j < kStep; ++j) out[j] = vector.at[j];
  }
}

// Sums up 16 bytes of depth before it adds them: the long sum is rounded a few times less often, and shared memory
// is what limits the pace.
template <int kTiles, typename T, bool kAcrossLeft, bool kAcrossRight>
__device__ __forceinline__ void scalar_multiply_add(const Factor<T, kAcrossLeft>& left,
                                                    const Factor<T, kAcrossRight>& right, int depth,
                                                    Sums<T> (&sums)[kTiles]) {
  constexpr int kStep = kVectorBytes / sizeof(T);
#pragma unroll 1
  for (int k = 0; k < depth; k += kStep) {
    T rows[2][kStep];
#pragma unroll
    for (int i = 0; i < 2; ++i) read_depth(left, row_of_sum(2 * i), k, rows[i]);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        T column[kStep];
        read_depth(right, tile * kTileColumns + column_of_sum(j), k, column);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          T sum = rows[i][0] * column[0];
#pragma unroll
          for (int step = 1; step < kStep; ++step) sum = fma(rows[i][step], column[step], sum);
          sums[tile].at[2 * i + j] += sum;
        }
      }
    }
  }
}

// sums[16, 8 kTiles] += left right, over a depth that is a multiple of kDepthStep. All of the warp calls it.
template <int kTiles, typename T, bool kAcrossLeft, bool kAcrossRight>
__device__ __forceinline__ void multiply_add(const Factor<T, kAcrossLeft>& left,
                                             const Factor<T, kAcrossRight>& right, int depth,
                                             Sums<Accumulator<T>> (&sums)[kTiles]) {
  if constexpr (sizeof(T) == 2) {
    tensor_multiply_add(left, right, depth, sums);
  } else {
    scalar_multiply_add(left, right, depth, sums);
  }
}

}  // namespace vitkern
