// SPDX-License-Identifier: Apache-2.0
// What the ops on pixels [B, N, C] and tokens [B, T, C] have in common: how they split the pixels, read a block of
// them, and multiply it.
//
// The pixels of an image are cut into parts, the tasks of parallel_for; a part is gone through in blocks, which stay
// in the first caches while everything that needs them is worked out. Both cuts follow from the sizes alone, so that
// no result depends on the number of threads.
#pragma once

#include <stdexcept>
#include <type_traits>

#include "common/scratch.h"
#include "common/tile.h"

namespace vitkern::VITKERN_ISA {
namespace {

constexpr int64_t kPartPixels = 256;  // at least: what a part leaves behind is then little beside its pixels
constexpr int64_t kTasks = 128;       // more are not needed
constexpr int64_t kBlockBytes = 24 << 10;
constexpr int64_t kMinBlock = 2 * kTileRows, kMaxBlock = 96;  // pixels

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

template <typename Acc>
int64_t whole_vectors(int64_t columns) {
  return divide_up(columns, kLanes<Acc>) * kLanes<Acc>;
}

struct PixelSplit {
  int64_t batch, pixels;
  int64_t block;        // pixels of a block
  int64_t parts;        // of an image
  int64_t part_pixels;  // of a part, but the last of an image may have fewer

  int64_t tasks() const { return batch * parts; }

  // Calls body(image, first pixel of all images, count) for each block of a task.
  template <typename Body>
  VITKERN_INLINE void for_blocks(int64_t task, const Body& body) const {
    const int64_t image = task / parts, begin = task % parts * part_pixels;
    const int64_t end = smaller(begin + part_pixels, pixels);
    for (int64_t first = begin; first < end; first += block)
      body(image, image * pixels + first, smaller(block, end - first));
  }
};

// `columns` numbers of type Acc belong to each pixel of a block.
template <typename Acc>
PixelSplit split_pixels(int64_t batch, int64_t pixels, int64_t columns) {
  PixelSplit split{batch, pixels, 0, 0, 0};
  const int64_t row_bytes = columns * static_cast<int64_t>(sizeof(Acc));
  const int64_t fitting = kBlockBytes / larger(row_bytes, 1) / kTileRows * kTileRows;
  split.block = smaller(larger(fitting, kMinBlock), kMaxBlock);
  const int64_t parts = smaller(divide_up(pixels, kPartPixels), divide_up(kTasks, larger(batch, 1)));
  split.part_pixels = larger(divide_up(divide_up(pixels, larger(parts, 1)), split.block), 1) * split.block;
  split.parts = larger(divide_up(pixels, split.part_pixels), 1);
  return split;
}

// Rows of a stored matrix as the tiles take them, in whole vectors: where they lie if that is what they are, else
// widened into a buffer, zero beyond the last column.
template <typename T>
struct RowBlock {
  using Acc = Accumulator<T>;
  int64_t columns, stride;
  Acc* buffer;

  bool in_place() const { return std::is_same<T, Acc>::value && columns == stride; }

  void lay_out(Cursor& cursor, int64_t rows, int64_t numbers) {
    columns = numbers;
    stride = whole_vectors<Acc>(numbers);
    buffer = cursor.take<Acc>(in_place() ? 0 : rows * stride);
  }

  const Acc* read(const T* from, int64_t rows) const {
    if constexpr (std::is_same<T, Acc>::value)
      if (in_place()) return from;
    for (int64_t row = 0; row < rows; ++row) {
      Acc* to = buffer + row * stride;
      widen_array(from + row * columns, columns, to);
      for (int64_t column = columns; column < stride; ++column) to[column] = 0;
    }
    return buffer;
  }
};

template <typename T>
Accumulator<T> dot(const T* a, const T* b, int64_t count) {
  constexpr int N = kLanes<Accumulator<T>>;
  Vec<Accumulator<T>, N> products = {};
  for (int64_t i = 0; i < count; i += N)
    products = multiply_add(load_some<N>(a + i, count - i), load_some<N>(b + i, count - i), products);
  return sum(products);
}

// One row of each of `count` sheets, added up in their order.
template <typename Acc>
void add_sheets(const Acc* sheets, int64_t sheet_size, int64_t count, int64_t columns, Acc* to) {
  constexpr int N = kLanes<Acc>;
  for (int64_t column = 0; column < columns; column += N) {
    Vec<Acc, N> sums = {};
    for (int64_t i = 0; i < count; ++i) sums = sums + load<Acc, N>(sheets + i * sheet_size + column);
    store_some(to + column, sums, columns - column);
  }
}

// Calls run(T{}) with the element type.
template <typename Run>
void dispatch_dtype(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::kFloat32:
      return run(float{});
    case DType::kFloat64:
      return run(double{});
    case DType::kFloat16:
      return run(Half{});
    case DType::kBFloat16:
      return run(BFloat16{});
  }
  throw std::invalid_argument("unknown dtype code");
}

// Rows of A times one panel of B, of which `columns` columns are used: calls body(row, column, vector of sums).
template <typename Acc, typename Body>
VITKERN_INLINE void multiply_panel(Strided<Acc> a, int64_t rows, const Acc* b, int64_t b_step, int64_t columns,
                                   int64_t depth, const Body& body) {
  for_width<Acc>(columns, [&](auto vectors) {
    for_tiles(rows, [&](auto height, int64_t row) {
      const auto sums = multiply<height.value, vectors.value>(a.from_row(row), b, b_step, depth);
      for_sums(sums, [&](int i, int64_t column, auto sum) { body(row + i, column, sum); });
    });
  });
}

}  // namespace
}  // namespace vitkern::VITKERN_ISA
