// SPDX-License-Identifier: Apache-2.0
// The product of two matrices by one block: a tile of kRows x 64 sums, over any depth.
//
// Work split: eight warps in strips of 16 rows, and side by side where there are fewer strips than warps.
// Memory: both factors come through shared memory in chunks of 128 bytes of depth; while the warps multiply
// one chunk the next is on its way. Elements outside of a matrix are zero, so no tail is a special case.
#pragma once

#include "common/warp_product.cuh"

namespace vitkern {

constexpr int kBlockThreads = 256;
constexpr int kBlockWarps = kBlockThreads / kWarpLanes;
constexpr int kColumns = 64;  // of a block's tile
constexpr int kChunkBytes = 128;

template <typename T>
constexpr int kChunk = kChunkBytes / int{sizeof(T)};

// Row-major and without gaps, in global memory.
template <typename T>
struct Matrix {
  const T* at;
  int64_t rows, columns;
  bool vectors;  // each row begins at a multiple of 16 bytes

  __device__ __forceinline__ Matrix(const void* at_, int64_t rows_, int64_t columns_)
      : at(static_cast<const T*>(at_)),
        rows(rows_),
        columns(columns_),
        vectors(aligned(at_) && columns_ % (kVectorBytes / sizeof(T)) == 0) {}
};

// Brings kRows x kWidth of the matrix to shared memory, by all threads. A reader waits for copies and
// passes a barrier first.
template <int kRows, int kWidth, typename T>
__device__ __forceinline__ void copy_tile(T* to, const Matrix<T>& from, int64_t first_row,
                                          int64_t first_column) {
  constexpr int kVector = kVectorBytes / sizeof(T), kPerRow = kWidth / kVector,
                kStep = kBlockThreads / kPerRow;
  static_assert(kBlockThreads % kPerRow == 0, "a thread keeps to its columns");
  const int row = threadIdx.x / kPerRow, column = threadIdx.x % kPerRow * kVector;
  const int columns_left = static_cast<int>(min(from.columns - first_column - column, int64_t{kVector}));
  const int rows_left = columns_left > 0 ? static_cast<int>(min(from.rows - first_row, int64_t{kRows})) : 0;
  const T* source = from.at;
  if (columns_left > 0) source += (first_row + row) * from.columns + first_column + column;
  T* target = to + row * (kWidth + kRowPad<T>)+column;
#pragma unroll 2
  for (int i = row; i < kRows; i += kStep) {
    if (from.vectors) {
      copy_async(target, i < rows_left ? source : from.at, i < rows_left);
    } else {
#pragma unroll 1
      for (int j = 0; j < kVector; ++j)
        target[j] = i < rows_left && j < columns_left ? __ldg(source + j) : narrow<T>(0);
    }
    source += kStep * from.columns;
    target += kStep * (kWidth + kRowPad<T>);
  }
}

// A factor that comes from global memory chunk by chunk: 64, or kRows, rows from `first` on and the depth along
// the columns; or the other way round if kAcross.
template <typename T, bool kAcross>
struct Streamed {
  static constexpr bool kIsAcross = kAcross;
  Matrix<T> matrix;
  int64_t first;

  template <int kExtent>
  __device__ __forceinline__ void stage(T* buffer, int64_t k) const {
    if constexpr (kAcross) {
      copy_tile<kChunk<T>, kExtent>(buffer, matrix, k, first);
    } else {
      copy_tile<kExtent, kChunk<T>>(buffer, matrix, first, k);
    }
  }
  template <int kExtent>
  __device__ __forceinline__ Factor<T, kAcross> factor(const T* buffer, int64_t) const {
    return {buffer, (kAcross ? kExtent : kChunk<T>)+kRowPad<T>};
  }
};

// A factor that is in shared memory for all of the depth, which is padded with zeros to a multiple of kColumns.
template <typename T>
struct Resident {
  static constexpr bool kIsAcross = false;
  const T* at;
  int stride;

  template <int kExtent>
  __device__ __forceinline__ void stage(T*, int64_t) const {}
  template <int kExtent>
  __device__ __forceinline__ Factor<T, false> factor(const T*, int64_t k) const {
    return {at + k, stride};
  }
};

// Rows that a block keeps in shared memory between two products, padded to a multiple of kColumns.
template <typename T>
struct SharedRows {
  T* at;
  int stride;

  __host__ __device__ static constexpr int64_t stride_of(int64_t columns) {
    return (columns + kColumns - 1) / kColumns * kColumns + kRowPad<T>;
  }
  __device__ __forceinline__ void store_pair(int row, int64_t column, Accumulator<T> first,
                                             Accumulator<T> second) const {
    *reinterpret_cast<Vector<T, 2>*>(at + row * stride + column) = {narrow<T>(first), narrow<T>(second)};
  }
  __device__ __forceinline__ Resident<T> factor() const { return {at, stride}; }
};

// The threads that own the sums of a tile of kRows x kColumns.
template <int kRows>
struct BlockTile {
  static constexpr int kStrips = kRows / kStrip, kBeside = kBlockWarps / kStrips;
  static constexpr int kTiles = kColumns / kBeside / kTileColumns;
  static_assert(kStrips * kBeside == kBlockWarps && kRows % kStrip == 0);

  static __device__ __forceinline__ int row() { return threadIdx.x / kWarpLanes % kStrips * kStrip; }
  static __device__ __forceinline__ int column() {
    return threadIdx.x / kWarpLanes / kStrips * (kColumns / kBeside);
  }
};

// The shared memory of block_product: two chunks of each factor; between products, a tile of sums.
template <typename T, int kRows>
struct Stage {
  template <int kExtent>
  static constexpr int kNumbers = kExtent * (kChunk<T> + kRowPad<T>) > kChunk<T>*(kExtent + kRowPad<T>)
                                      ? kExtent * (kChunk<T> + kRowPad<T>)
                                      : kChunk<T> * (kExtent + kRowPad<T>);
  static constexpr int kLeft = kNumbers<kRows>, kRight = kNumbers<kColumns>;
  static constexpr int kSumsStride = kColumns + kRowPad<Accumulator<T>>;
  static constexpr int kBytes = 2 * (kLeft + kRight) * int{sizeof(T)};
  static_assert(kBytes >= kRows * kSumsStride * int{sizeof(Accumulator<T>)});

  unsigned char* bytes;

  __device__ __forceinline__ T* left(int which) const {
    return reinterpret_cast<T*>(bytes) + which * (kLeft + kRight);
  }
  __device__ __forceinline__ T* right(int which) const { return left(which) + kLeft; }
};

struct NothingMore {
  template <typename T>
  __device__ __forceinline__ void operator()(const T*) const {}
};

// sums += left right over `depth`. `with_left` sees each staged chunk of the left factor. All of the block
// calls it; what was in the stage is lost.
template <int kRows, typename T, typename Left, typename Right, typename WithLeft = NothingMore>
__device__ __forceinline__ void block_product(const Left& left, const Right& right, int64_t depth,
                                              const Stage<T, kRows>& stage,
                                              Sums<Accumulator<T>> (&sums)[BlockTile<kRows>::kTiles],
                                              const WithLeft& with_left = {}) {
  if (depth == 0) return;
  __syncthreads();  // after the last read of the stage's old content
#pragma unroll 1
  for (int64_t k = 0, which = 0;; k += kChunk<T>, which ^= 1) {
    if (k < depth) {
      left.template stage<kRows>(stage.left(which), k);
      right.template stage<kColumns>(stage.right(which), k);
    }
    if (k > 0) {
      const int arrived = which ^ 1;
      multiply_add(
          left.template factor<kRows>(stage.left(arrived), k - kChunk<T>).from(BlockTile<kRows>::row(), 0),
          right.template factor<kColumns>(stage.right(arrived), k - kChunk<T>)
              .from(BlockTile<kRows>::column(), 0),
          kChunk<T>, sums);
      with_left(stage.left(arrived));
    }
    if (k >= depth) break;
    wait_for_copies();
    __syncthreads();  // the chunk has arrived, and the one before is read no more
  }
}

// Calls use(row, column, sum, next sum) for the sums that the caller holds: two neighbours in a row.
template <int kRows, typename A, typename Use>
__device__ __forceinline__ void for_pairs(Sums<A> (&sums)[BlockTile<kRows>::kTiles], const Use& use) {
#pragma unroll
  for (int tile = 0; tile < BlockTile<kRows>::kTiles; ++tile)
#pragma unroll
    for (int i = 0; i < 4; i += 2)
      use(BlockTile<kRows>::row() + row_of_sum(i),
          BlockTile<kRows>::column() + tile * kTileColumns + column_of_sum(0), sums[tile].at[i],
          sums[tile].at[i + 1]);
}

// Calls use(row, column, numbers) for all sums of the tile, such that each thread gets neighbours in a row that
// make 16 bytes of T, and a warp whole rows. All of the block calls it.
template <int kRows, typename T, typename Use>
__device__ __forceinline__ void for_rows(Sums<Accumulator<T>> (&sums)[BlockTile<kRows>::kTiles],
                                         const Stage<T, kRows>& stage, const Use& use) {
  using A = Accumulator<T>;
  constexpr int kVector = kVectorBytes / sizeof(T), kPerRow = kColumns / kVector;
  A* all = reinterpret_cast<A*>(stage.bytes);
  __syncthreads();  // after the last read of a chunk
  for_pairs<kRows>(sums, [&](int row, int column, A left, A right) {
    *reinterpret_cast<Vector<A, 2>*>(all + row * stage.kSumsStride + column) = {left, right};
  });
  __syncthreads();
#pragma unroll
  for (int slot = threadIdx.x; slot < kRows * kPerRow; slot += kBlockThreads) {
    const int row = slot / kPerRow, column = slot % kPerRow * kVector;
    A numbers[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) numbers[i] = all[row * stage.kSumsStride + column + i];
    use(row, column, numbers);
  }
}

// Neighbours in a row of a matrix, for for_rows: those outside are zero, or stay unwritten.
template <int kCount, typename T>
__device__ __forceinline__ void load_part(const T* row, int64_t column, int64_t columns, bool vectors,
                                          Accumulator<T> (&out)[kCount]) {
  if (vectors && column < columns) return load(row + column, out);
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    out[i] = column + i < columns ? widen(__ldg(row + column + i)) : Accumulator<T>{0};
}

template <int kCount, typename T>
__device__ __forceinline__ void store_part(T* row, int64_t column, int64_t columns, bool vectors,
                                           const Accumulator<T> (&in)[kCount]) {
  if (vectors && column < columns) return store(row + column, in);
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (column + i < columns) row[column + i] = narrow<T>(in[i]);
}

}  // namespace vitkern
