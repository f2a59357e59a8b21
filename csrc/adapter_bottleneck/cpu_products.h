// SPDX-License-Identifier: Apache-2.0
// Shared by forward and backward: packed weights, blocks of rows, and the two products of a block, from channels to
// hidden units and back.
#pragma once

#include "adapter_bottleneck/params.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/sizes.h"
#include "common/tile.h"

namespace vitkern::VITKERN_ISA {
namespace {

using Params = AdapterBottleneckParams;

// Channels summed at a time: a panel of this length is half of the first cache.
constexpr int64_t kStretch = 256;
constexpr int64_t kMinBlock = 24, kMaxBlock = 48;  // rows: those of x stay in the second cache

// Rows of a task, chosen so that the workers end at about the same time.
inline int64_t block_rows(int64_t rows, int64_t threads) {
  int64_t best = kMinBlock, best_turn = INT64_MAX;
  for (int64_t block = kTileRows; block <= kMaxBlock; block += kTileRows) {
    if (block < kMinBlock && rows > kMinBlock * threads) continue;
    const int64_t turn = divide_up(divide_up(rows, block), threads) * block;
    if (turn > best_turn) continue;
    best = block;
    best_turn = turn;
  }
  return best;
}

// Hidden units are padded to whole panels.
template <typename T>
int64_t padded_hidden(const Params& p) {
  return round_up(p.hidden, kPanel<Accumulator<T>>);
}

// Stride of hidden units' rows in scratch: a cache line more, as rows a power of two apart would share few cache sets.
template <typename T>
int64_t hidden_stride(const Params& p) {
  return padded_hidden<T>(p) + 64 / sizeof(Accumulator<T>);
}

template <typename T>
int64_t padded_channels(const Params& p) {
  return round_up(p.channels, kPanel<Accumulator<T>>);
}

// Weights as panels: of hidden units [C, H] for the down projection, of channels [H, C] for the up projection.
template <typename T>
struct Panels {
  using Acc = Accumulator<T>;
  Acc* to_hidden = nullptr;
  Acc* to_channels = nullptr;
};

// One panel of [C, H]; `weight` is down_weight [H, C] (transposed) or up_weight [C, H].
template <typename T>
void pack_to_hidden(const Params& p, const T* weight, bool transposed, int64_t panel, Accumulator<T>* to) {
  using Acc = Accumulator<T>;
  const int64_t first = panel * kPanel<Acc>, columns = panel_columns<Acc>(p.hidden, panel);
  if (transposed)
    pack_columns(weight + first * p.channels, p.channels, p.channels, columns, to + first * p.channels);
  else
    pack_rows(weight + first, p.hidden, p.channels, columns, to + first * p.channels);
}

// One panel of [H, C]; `weight` is up_weight [C, H] (transposed) or down_weight [H, C].
template <typename T>
void pack_to_channels(const Params& p, const T* weight, bool transposed, int64_t panel, Accumulator<T>* to) {
  using Acc = Accumulator<T>;
  const int64_t first = panel * kPanel<Acc>, columns = panel_columns<Acc>(p.channels, panel);
  if (transposed)
    pack_columns(weight + first * p.hidden, p.hidden, p.hidden, columns, to + first * p.hidden);
  else
    pack_rows(weight + first, p.channels, p.hidden, columns, to + first * p.hidden);
}

// to[r, h] = sum over c of from[r, c] * panels[c, h], in steps of about kStretch channels. If `from` has another type,
// `wide` [rows, kStretch] takes each step's channels as accumulators.
template <typename T, typename Acc = Accumulator<T>>
void multiply_to_hidden(const Params& p, const T* from, int64_t rows, const Acc* panels_of_weight, Acc* wide,
                        Acc* to) {
  constexpr int N = kLanes<Acc>;
  const int64_t stride = hidden_stride<T>(p);
  const int64_t step = divide_up(p.channels, divide_up(p.channels, kStretch) + (p.channels == 0));
  int64_t first = 0;
  do {
    const int64_t depth = smaller(step, p.channels - first);
    Strided<Acc> a;
    if constexpr (sizeof(T) == sizeof(Acc)) {
      a = {from + first, p.channels, 1};
    } else {
      for (int64_t row = 0; row < rows; ++row)
        widen_array(from + row * p.channels + first, depth, wide + row * kStretch);
      a = {wide, kStretch, 1};
    }
    for (int64_t panel = 0; panel < panels<Acc>(p.hidden); ++panel) {
      const Acc* b = panels_of_weight + (panel * p.channels + first) * kPanel<Acc>;
      for_width<Acc>(panel_columns<Acc>(p.hidden, panel), [&](auto vectors) {
        for_tiles(rows, [&](auto height, int64_t row) {
          const auto sums = multiply<height.value, vectors.value>(a.from_row(row), b, kPanel<Acc>, depth);
          for_sums(sums, [&](int i, int64_t column, auto sum) {
            Acc* sum_at = to + (row + i) * stride + panel * kPanel<Acc> + column;
            if (first > 0) sum = sum + load<Acc, N>(sum_at);
            store(sum_at, sum);
          });
        });
      });
    }
    first += step;
  } while (first < p.channels);
}

// The output from a sum over hidden units: scale * (sum + bias) + added.
template <typename T>
struct ChannelOutput {
  using Acc = Accumulator<T>;
  T* to;            // [rows, C]
  const T* added;   // [rows, C], optional
  const Acc* bias;  // [C padded], optional
  Acc scale;
  int64_t channels;  // C

  template <int kRows, int kVectors>
  VITKERN_INLINE void finish(Sums<kRows, kVectors, Acc> sums, int64_t row, int64_t channel,
                             int64_t count) const {
    constexpr int N = kLanes<Acc>;
    const int64_t at = row * channels + channel;
    const auto each = [&](const auto& body) VITKERN_INLINE_LAMBDA {
      unrolled<kRows>([&](auto i) VITKERN_INLINE_LAMBDA {
        unrolled<kVectors>([&](auto j) VITKERN_INLINE_LAMBDA {
          body(sums.at[i.value][j.value], at + i.value * channels + j.value * N, j.value * N);
        });
      });
    };
    if (bias)
      each([&](auto& sum, int64_t, int column)
               VITKERN_INLINE_LAMBDA { sum = sum + load<Acc, N>(bias + channel + column); });
    const auto factor = broadcast<Acc, N>(scale);
    each([&](auto& sum, int64_t, int) VITKERN_INLINE_LAMBDA { sum = sum * factor; });
    if (count < kVectors * N) {
      each([&](auto& sum, int64_t place, int column) VITKERN_INLINE_LAMBDA {
        if (added) sum = sum + load_some<N>(added + place, count - column);
        store_some<N>(to + place, sum, count - column);
      });
      return;
    }
    if (added)
      each([&](auto& sum, int64_t place, int)
               VITKERN_INLINE_LAMBDA { sum = sum + load_wide<N>(added + place); });
    each([&](auto& sum, int64_t place, int) VITKERN_INLINE_LAMBDA { store_narrow<N>(to + place, sum); });
  }
};

// Sums over h of from[row, h] * panels[h, c]. The output is written in stretches of kStretch channels: a pass over all
// rows for each panel's few channels would touch too many pages.
template <typename T, typename Acc>
void multiply_to_channels(const Params& p, const Acc* from, int64_t rows, const Acc* panels_of_weight,
                          const ChannelOutput<T>& output) {
  const Strided<Acc> a = {from, hidden_stride<T>(p), 1};
  const int64_t hidden = p.hidden;
  for (int64_t start = 0; start < p.channels; start += kStretch) {
    const int64_t stop = smaller(start + kStretch, p.channels);
    for_tiles(rows, [=](auto height, int64_t row) {
      const ChannelOutput<T> out = output;  // a copy: the stores below cannot alias it
      for (int64_t channel = start; channel < stop; channel += kPanel<Acc>) {
        const Acc* b = panels_of_weight + channel * hidden;
        const auto sums = multiply<height.value, kPanelVectors>(a.from_row(row), b, kPanel<Acc>, hidden);
        out.finish(sums, row, channel, stop - channel);
      }
    });
  }
}

// s of eq. (3).
template <typename T>
Accumulator<T> scale_of(const Params& p) {
  using Acc = Accumulator<T>;
  return static_cast<Acc>(p.factor) * (p.scale ? *static_cast<const Acc*>(p.scale) : Acc{1});
}

}  // namespace
}  // namespace vitkern::VITKERN_ISA
