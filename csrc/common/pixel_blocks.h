// SPDX-License-Identifier: Apache-2.0
// The common code of the ops on pixels [B, N, C] and tokens [B, T, C]: splitting the pixels, reading and writing a block
// of them, and the three products of a block with tokens.
//
// The pixels of an image are cut into parts, the tasks of parallel_for; a part is processed in blocks, which stay in the
// first caches until all their results are computed. Both cuts follow from the sizes alone, so that no result depends on
// the number of threads.
#pragma once

#include <math.h>

#include <type_traits>

#include "common/dispatch.h"
#include "common/scratch.h"
#include "common/sizes.h"
#include "common/tile.h"

namespace vitkern::VITKERN_ISA {
namespace {

// Parts are halved while they keep this many pixels, so that a part's results are small compared to it. While there are
// few tasks, fewer pixels suffice: idle threads cost more. More than kTasks tasks are not needed.
constexpr int64_t kPartPixels = 160, kSmallPartPixels = 48;
constexpr int64_t kFewTasks = 8, kTasks = 128;
constexpr int64_t kMinBlock = 2 * kTileRows, kMaxBlock = 96;  // pixels
constexpr int64_t kBlockBytes = 24 << 10;                     // in the first cache
constexpr int64_t kWideBlockBytes = 192 << 10;                // in the second

template <typename Acc>
constexpr Acc kInfinity = static_cast<Acc>(HUGE_VAL);

struct PixelSplit {
  int64_t batch, pixels;
  int64_t block;  // pixels of a block
  int64_t parts;  // of an image

  int64_t tasks() const { return batch * parts; }

  // Parts are whole tiles, but for the last.
  int64_t begin_of(int64_t part) const {
    return part == parts ? pixels : pixels * part / parts / kTileRows * kTileRows;
  }

  // Calls body(image, first pixel counted from the first image, pixels) for each block of a task.
  template <typename Body>
  VITKERN_INLINE void for_blocks(int64_t task, const Body& body) const {
    const int64_t image = task / parts, end = begin_of(task % parts + 1);
    for (int64_t first = begin_of(task % parts); first < end; first += block)
      body(image, image * pixels + first, smaller(block, end - first));
  }
};

// `columns` numbers of type Acc belong to each pixel of a block. Blocks have `deep` pixels at least, if the second cache
// has room for them: in sums over pixels, each block moves the sums to the registers and back.
template <typename Acc>
PixelSplit split_pixels(int64_t batch, int64_t pixels, int64_t columns, int64_t deep) {
  PixelSplit split{batch, pixels, 0, 1};
  const int64_t row_bytes = larger(columns * static_cast<int64_t>(sizeof(Acc)), 1);
  const int64_t fitting = larger(kBlockBytes / row_bytes, smaller(deep, kWideBlockBytes / row_bytes));
  split.block = smaller(larger(fitting / kTileRows * kTileRows, kMinBlock), kMaxBlock);
  while (split.tasks() < kTasks &&
         pixels / (2 * split.parts) >= (split.tasks() < kFewTasks ? kSmallPartPixels : kPartPixels))
    split.parts *= 2;
  return split;
}

// Rows of a stored matrix as whole vectors, the form that the products need: in place if they have that form, else in a
// buffer, zero beyond the last column.
template <typename T>
struct RowBlock {
  using Acc = Accumulator<T>;
  int64_t columns, stride;
  Acc* buffer;

  void lay_out(Cursor& cursor, int64_t rows, int64_t numbers) {
    columns = numbers;
    stride = whole_vectors<Acc>(numbers);
    buffer = cursor.take<Acc>(in_place() ? 0 : rows * stride);
  }

  bool in_place() const { return std::is_same<T, Acc>::value && columns == stride; }

  const Acc* read(const T* from, int64_t rows) const {
    if (in_place()) return reinterpret_cast<const Acc*>(from);
    for (int64_t row = 0; row < rows; ++row) {
      Acc* const to = buffer + row * stride;
      widen_array(from + row * columns, columns, to);
      for (int64_t column = columns; column < stride; ++column) to[column] = 0;
    }
    return buffer;
  }

  // Where to put rows that are then to be written.
  Acc* target(T* to) const { return in_place() ? reinterpret_cast<Acc*>(to) : buffer; }

  void write(T* to, int64_t rows) const {
    if (in_place()) return;
    for (int64_t row = 0; row < rows; ++row) narrow_array(buffer + row * stride, columns, to + row * columns);
  }
};

// The columns of one panel, of the block that follows this one.
template <typename T>
VITKERN_INLINE void prefetch_panel(const T* block, int64_t columns, int64_t rows, int64_t column) {
  const T* next = block + rows * columns + column;
  for (int64_t row = 0; row < rows; ++row) prefetch(next + row * columns);
}

// Rows of A times one panel of B, of which `columns` columns are used: calls body(row, column, vector of sums).
template <typename Acc, typename Body>
VITKERN_INLINE void multiply_panel(Strided<Acc> a, int64_t rows, const Acc* b, int64_t b_step,
                                   int64_t columns, int64_t depth, const Body& body) {
  for_width<Acc>(columns, [&](auto vectors) VITKERN_INLINE_LAMBDA {
    for_tiles(rows, [&](auto height, int64_t row) VITKERN_INLINE_LAMBDA {
      const auto sums = multiply<height.value, vectors.value>(a.from_row(row), b, b_step, depth);
      for_sums(sums,
               [&](int i, int64_t column, auto sum) VITKERN_INLINE_LAMBDA { body(row + i, column, sum); });
    });
  });
}

// A matrix [T, C] by which rows [P, C] are multiplied to [P, T].
template <typename Acc>
struct PackedColumns {
  int64_t tokens, channels;
  Acc* data;  // [panels of T][C][kPanel]
  const void* packed;

  void lay_out(Cursor& cursor, int64_t rows, int64_t columns) {
    tokens = rows;
    channels = columns;
    data = cursor.take<Acc>(panels<Acc>(tokens) * kPanel<Acc> * channels);
    packed = nullptr;
  }

  // Tasks come in order, so a worker seldom meets another image.
  template <typename T>
  void pack(const T* from) {
    if (from == packed) return;
    packed = from;
    for (int64_t token = 0; token < tokens; token += kPanel<Acc>)
      pack_columns(from + token * channels, channels, channels, smaller(kPanel<Acc>, tokens - token),
                   data + token * channels);
  }

  void multiply(const Acc* rows, int64_t row_stride, int64_t count, Acc* to, int64_t stride) const {
    for (int64_t token = 0; token < tokens; token += kPanel<Acc>)
      multiply_some(rows, row_stride, count, token, to + token, stride);
  }

  // The columns of one panel only.
  void multiply_some(const Acc* rows, int64_t row_stride, int64_t count, int64_t token, Acc* to,
                     int64_t stride) const {
    multiply_panel<Acc>({rows, row_stride, 1}, count, data + token * channels, kPanel<Acc>, tokens - token,
                        channels, [&](int64_t row, int64_t column, auto sum) VITKERN_INLINE_LAMBDA {
                          store(to + row * stride + column, sum);
                        });
  }
};

// A matrix [T, C] by which weights [P, T] are multiplied to [P, C], a panel of channels at a time.
template <typename Acc>
struct PackedByRows {
  int64_t tokens, channels, stride;  // stride: C in whole vectors
  Acc* data;                         // [panels of C][T][kPanel]
  const void* packed;

  void lay_out(Cursor& cursor, int64_t rows, int64_t columns) {
    tokens = rows;
    channels = columns;
    stride = whole_vectors<Acc>(columns);
    data = cursor.take<Acc>(panels<Acc>(channels) * kPanel<Acc> * tokens);
    packed = nullptr;
  }

  template <typename T>
  void pack_some(const T* from, int64_t first, int64_t count) {
    for (int64_t channel = 0; channel < channels; channel += kPanel<Acc>)
      pack_rows(from + channel, channels, count, smaller(kPanel<Acc>, channels - channel),
                data + channel * tokens + first * kPanel<Acc>);
  }

  template <typename T>
  void pack(const T* from) {
    if (from == packed) return;
    packed = from;
    pack_some(from, 0, tokens);
  }

  // The panel at `channel` of the products, plus the same of `addend` if there is one, to rows of `stride` numbers.
  void multiply(const Acc* weights, int64_t weight_stride, int64_t count, int64_t channel, const Acc* addend,
                Acc* to) const {
    multiply_panel<Acc>({weights, weight_stride, 1}, count, data + channel * tokens, kPanel<Acc>,
                        channels - channel, tokens,
                        [&](int64_t row, int64_t column, auto sum) VITKERN_INLINE_LAMBDA {
                          const int64_t at = row * stride + channel + column;
                          store(to + at, addend ? load<Acc, kLanes<Acc>>(addend + at) + sum : sum);
                        });
  }
};

// sheet[t, c] += sum over the pixels of a block of weights[p, t] * rows[p, c], for one panel of channels.
template <typename Acc>
void add_products(const Acc* weights, int64_t weight_stride, int64_t tokens, const Acc* rows, int64_t stride,
                  int64_t count, int64_t channel, Acc* sheet) {
  constexpr int N = kLanes<Acc>;
  multiply_panel<Acc>({weights, 1, weight_stride}, tokens, rows + channel, stride, stride - channel, count,
                      [&](int64_t token, int64_t column, auto sum) VITKERN_INLINE_LAMBDA {
                        Acc* const to = sheet + token * stride + channel + column;
                        store(to, load<Acc, N>(to) + sum);
                      });
}

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

}  // namespace
}  // namespace vitkern::VITKERN_ISA
