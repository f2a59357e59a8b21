// SPDX-License-Identifier: Apache-2.0
// Forward, eqs. (1) to (3): a block of rows goes through both products while it is in the second cache.
//
// Work split: both weights are packed, one task a panel; then a task is a block of rows.
// Memory: x is read once, and again from the cache if it is the residual; the output is written once; the hidden units
// of a block are in scratch only.
// Numerics: sums in the accumulator type, over kStretch channels at a time; a row's result depends on that row only.
#pragma once

#include "adapter_bottleneck/cpu_activation.h"
#include "adapter_bottleneck/cpu_dropout.h"
#include "adapter_bottleneck/cpu_products.h"

namespace vitkern::VITKERN_ISA {
namespace {

template <typename T>
struct ForwardScratch {
  using Acc = Accumulator<T>;
  Acc* down;       // panels of [C, H]
  Acc* up;         // panels of [H, C]
  Acc* down_bias;  // [H] padded, zeros if there is none
  Acc* up_bias;    // [C] padded

  void lay_out(Cursor& cursor, const Params& p) {
    down = cursor.take<Acc>(padded_hidden<T>(p) * p.channels);
    up = cursor.take<Acc>(padded_channels<T>(p) * p.hidden);
    down_bias = cursor.take<Acc>(padded_hidden<T>(p));
    up_bias = cursor.take<Acc>(padded_channels<T>(p));
  }
};

template <typename T>
struct ForwardWorker {
  using Acc = Accumulator<T>;
  Acc* wide;    // [block, kStretch]: channels as accumulators
  Acc* hidden;  // [block, H padded]
  Acc* factor;  // of dropout

  void lay_out(Cursor& cursor, const Params& p) {
    wide = cursor.take<Acc>(kMaxBlock * kStretch);
    hidden = cursor.take<Acc>(kMaxBlock * hidden_stride<T>(p));
    factor = cursor.take<Acc>(dropout_space(kMaxBlock * p.hidden) + kPanel<Acc>);
  }
};

template <typename Acc, typename T>
void widen_bias(const void* bias, int64_t count, int64_t padded, T, Acc* to) {
  memset(to, 0, padded * sizeof(Acc));
  if (bias) widen_array(static_cast<const T*>(bias), count, to);
}

// Turns z into a, eqs. (1) and (2); writes z to `kept` unless null.
template <Activation kActivation, typename T, typename Acc>
void activate_block(const Params& p, int64_t first, int64_t rows, const Acc* bias,
                    const ForwardWorker<T>& worker) {
  constexpr int N = kLanes<Acc>;
  const bool drops = p.dropout.seed != nullptr;
  const Acc* factors =
      drops ? dropout_factors(p.dropout, first * p.hidden, rows * p.hidden, worker.factor) : nullptr;
  for (int64_t row = 0; row < rows; ++row) {
    Acc* hidden = worker.hidden + row * hidden_stride<T>(p);
    Acc* kept = p.kept ? static_cast<Acc*>(p.kept) + (first + row) * p.hidden : nullptr;
    for (int64_t h = 0; h < p.hidden; h += N) {
      const auto z = load<Acc, N>(hidden + h) + load<Acc, N>(bias + h);
      if (kept) store_some<N>(kept + h, z, p.hidden - h);
      auto a = activate<kActivation>(z);
      if (drops) a = a * load<Acc, N>(factors + row * p.hidden + h);
      store(hidden + h, a);
    }
  }
}

template <typename T>
void forward(const Params& p) {
  using Acc = Accumulator<T>;
  const int64_t block = block_rows(p.rows, p.threads), blocks = divide_up(p.rows, block);
  ForwardScratch<T> shared;
  ForwardWorker<T>* workers;
  const Arena arena([&](Cursor& cursor) {
    shared.lay_out(cursor, p);
    workers = take_each<ForwardWorker<T>>(cursor, worker_count(blocks, p.threads),
                                          [&](ForwardWorker<T>& each) { each.lay_out(cursor, p); });
  });

  const int64_t hidden_panels = panels<Acc>(p.hidden);
  parallel_for(hidden_panels + panels<Acc>(p.channels), p.threads, [&](int64_t task, int) {
    if (task < hidden_panels)
      pack_to_hidden(p, static_cast<const T*>(p.down_weight), true, task, shared.down);
    else
      pack_to_channels(p, static_cast<const T*>(p.up_weight), true, task - hidden_panels, shared.up);
  });
  widen_bias(p.down_bias, p.hidden, padded_hidden<T>(p), T{}, shared.down_bias);
  widen_bias(p.up_bias, p.channels, padded_channels<T>(p), T{}, shared.up_bias);

  const T* const x = static_cast<const T*>(p.x);
  const T* const residual = p.residual_is_x ? x : static_cast<const T*>(p.residual);
  T* const output = static_cast<T*>(p.output);
  parallel_for(blocks, p.threads, [&](int64_t task, int index) {
    ForwardWorker<T>& worker = workers[index];
    const int64_t first = task * block, rows = smaller(block, p.rows - first);
    multiply_to_hidden(p, x + first * p.channels, rows, shared.down, worker.wide, worker.hidden);
    dispatch_activation(p.activation, [&](auto activation) {
      activate_block<activation.value>(p, first, rows, shared.down_bias, worker);
    });
    const int64_t at = first * p.channels;
    const ChannelOutput<T> to = {output + at, residual ? residual + at : nullptr,
                                 p.up_bias ? shared.up_bias : nullptr, scale_of<T>(p), p.channels};
    multiply_to_channels(p, worker.hidden, rows, shared.up, to);
  });
}

}  // namespace
}  // namespace vitkern::VITKERN_ISA
