// SPDX-License-Identifier: Apache-2.0
// Products of small matrices: a tile of sums stays in registers while it is fed from A and B.
//
//   sums[m, n] = sum over k of A[m, k] * B[k, n]
//
// A is read number by number, each broadcast to a vector, so it may have any strides: a transpose costs nothing.
// B is read vector by vector and is best packed first, in panels of kPanel columns, zero beyond the last column:
// [panel][k][kPanel], so that a tile reads it as one stream. Everything is of accumulator type; packing widens.
//
// A caller loops over panels of B (panel_columns), in each over tiles of rows of A (for_tiles), and uses the sums while
// they are in registers:
//
//   for_tiles(rows, [&](auto height, int64_t row) {
//     const auto sums = multiply<height.value, kVectors>(a.from_row(row), panel, kPanel<Acc>, depth);
//     for_sums(sums, [&](int i, int64_t column, auto sum) { store(to + (row + i) * stride + column, sum); });
//   });
//
// A depth of some hundred keeps a panel in the first cache; sums of several depths are added by the caller, which
// is also the more exact way. Each sum depends on its own row and column only: results do not depend on how rows
// are split into tiles.
#pragma once

#include "common/elements.h"
#include "common/sizes.h"

namespace vitkern::VITKERN_ISA {
namespace {

// Tile and two vectors of B fit in the registers: 16, or 32 where vectors have 64 bytes.
constexpr int kTileRows = VITKERN_VECTOR_BYTES == 64 ? 12 : 6;
constexpr int kPanelVectors = 2;
template <typename Acc>
constexpr int64_t kPanel = kPanelVectors * kLanes<Acc>;

template <int kValue>
struct Int {
  static constexpr int value = kValue;
};

// A[m, k] is data[m * row + k * step].
template <typename Acc>
struct Strided {
  const Acc* data;
  int64_t row, step;

  VITKERN_INLINE Strided from_row(int64_t m) const { return {data + m * row, row, step}; }
  VITKERN_INLINE Strided from_step(int64_t k) const { return {data + k * step, row, step}; }
};

template <int kRows, int kVectors, typename Acc>
struct Sums {
  Vec<Acc, kLanes<Acc>> at[kRows][kVectors];
};

template <int... kIndices>
struct Indices {};
template <int kCount, int... kIndices>
struct IndicesBelow : IndicesBelow<kCount - 1, kCount - 1, kIndices...> {};
template <int... kIndices>
struct IndicesBelow<0, kIndices...> {
  using Type = Indices<kIndices...>;
};

template <typename Body, int... kIndices>
VITKERN_INLINE void call_each(const Body& body, Indices<kIndices...>) {
  (body(Int<kIndices>{}), ...);
}

// Calls body(Int<0>{}), body(Int<1>{}), ...: indices are constants from the first, so that arrays become registers.
template <int kCount, typename Body>
VITKERN_INLINE void unrolled(const Body& body) {
  call_each(body, typename IndicesBelow<kCount>::Type{});
}

// The sums of kRows rows of A and kVectors vectors of columns of B, whose row k starts at b + k * b_step.
template <int kRows, int kVectors, typename Acc>
VITKERN_INLINE Sums<kRows, kVectors, Acc> multiply(Strided<Acc> a, const Acc* b, int64_t b_step,
                                                   int64_t depth) {
  constexpr int N = kLanes<Acc>;
  // A pointer for every third row: an instruction's address can add one or two strides, and no register is left
  // for more. The compiler must not know how the pointers are related, or it gives each row a register again.
  constexpr int kShared = 3;
  const Acc* rows[(kRows + kShared - 1) / kShared];
  unrolled<(kRows + kShared - 1) / kShared>([&](auto group) VITKERN_INLINE_LAMBDA {
    rows[group.value] = opaque(a.data + group.value * kShared * a.row);
  });
  Sums<kRows, kVectors, Acc> sums = {};
  for (int64_t k = 0; k < depth; ++k, b += b_step) {
    Vec<Acc, N> columns[kVectors];
    unrolled<kVectors>([&](auto j)
                           VITKERN_INLINE_LAMBDA { columns[j.value] = load<Acc, N>(b + j.value * N); });
    unrolled<kRows>([&](auto i) VITKERN_INLINE_LAMBDA {
      const Acc*& row = rows[i.value / kShared];
      const auto number = broadcast<Acc, N>(row[i.value % kShared * a.row]);
      unrolled<kVectors>([&](auto j) VITKERN_INLINE_LAMBDA {
        auto& sum = sums.at[i.value][j.value];
        sum = multiply_add(number, columns[j.value], sum);
      });
      if constexpr (i.value % kShared == kShared - 1 || i.value == kRows - 1) row += a.step;
    });
  }
  return sums;
}

// Calls body(i, column, vector) for each vector of a tile.
template <int kRows, int kVectors, typename Acc, typename Body>
VITKERN_INLINE void for_sums(const Sums<kRows, kVectors, Acc>& sums, const Body& body) {
  unrolled<kRows>([&](auto i) VITKERN_INLINE_LAMBDA {
    unrolled<kVectors>([&](auto j) VITKERN_INLINE_LAMBDA {
      body(i.value, int64_t{j.value} * kLanes<Acc>, sums.at[i.value][j.value]);
    });
  });
}

// Calls body(Int<height>{}, first row) for tiles that cover `rows` rows: the highest first, then smaller ones.
template <typename Body>
VITKERN_INLINE void for_tiles(int64_t rows, const Body& body) {
  int64_t row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) body(Int<kTileRows>{}, row);
  for (; row + 4 <= rows; row += 4) body(Int<4>{}, row);
  for (; row + 2 <= rows; row += 2) body(Int<2>{}, row);
  if (row < rows) body(Int<1>{}, row);
}

// Calls body(Int<vectors>{}) with as many vectors as `columns` columns of a panel need.
template <typename Acc, typename Body>
VITKERN_INLINE void for_width(int64_t columns, const Body& body) {
  if (columns > kLanes<Acc>)
    body(Int<kPanelVectors>{});
  else
    body(Int<1>{});
}

template <typename Acc>
VITKERN_INLINE int64_t panels(int64_t columns) {
  return divide_up(columns, kPanel<Acc>);
}

// How many of `columns` columns are in this panel.
template <typename Acc>
VITKERN_INLINE int64_t panel_columns(int64_t columns, int64_t panel) {
  return smaller(columns - panel * kPanel<Acc>, kPanel<Acc>);
}

// One panel, [depth][kPanel], of a B whose rows are stored: B[k, n] is from[k * stride + n].
template <typename T>
void pack_rows(const T* from, int64_t stride, int64_t depth, int64_t columns, Accumulator<T>* to) {
  using Acc = Accumulator<T>;
  constexpr int N = kLanes<Acc>;
  for (int64_t k = 0; k < depth; ++k, from += stride, to += kPanel<Acc>) {
    if (columns == kPanel<Acc>) {
      for (int j = 0; j < kPanelVectors; ++j) store(to + j * N, load_wide<N>(from + j * N));
    } else {
      widen_array(from, columns, to);
      for (int64_t n = columns; n < kPanel<Acc>; ++n) to[n] = 0;
    }
  }
}

// The first `count` lanes of a vector, from and to memory that may end there; the other lanes are zero.
template <int N, typename T>
VITKERN_INLINE Vec<Accumulator<T>, N> load_some(const T* from, int64_t count) {
  if (count >= N) return load_wide<N>(from);
  T padded[N] = {};
  if (count > 0) memcpy(padded, from, count * sizeof(T));
  return load_wide<N>(padded);
}

template <int N, typename T>
VITKERN_INLINE void store_some(T* to, Vec<Accumulator<T>, N> a, int64_t count) {
  if (count >= N) return store_narrow<N>(to, a);
  T padded[N];
  store_narrow<N>(padded, a);
  if (count > 0) memcpy(to, padded, count * sizeof(T));
}

// One panel of a B whose columns are stored: B[k, n] is from[n * stride + k].
template <typename T>
void pack_columns(const T* from, int64_t stride, int64_t depth, int64_t columns, Accumulator<T>* to) {
  using Acc = Accumulator<T>;
  constexpr int N = kLanes<Acc>;
  for (int64_t k = 0; k < depth; k += N) {
    const int64_t steps = depth - k < N ? depth - k : N;
    for (int64_t n = 0; n < kPanel<Acc>; ++n) {
      Acc numbers[N];
      store(numbers, load_some<N>(from + n * stride + k, n < columns ? steps : 0));
      for (int64_t i = 0; i < steps; ++i) to[(k + i) * kPanel<Acc> + n] = numbers[i];
    }
  }
}

}  // namespace
}  // namespace vitkern::VITKERN_ISA
