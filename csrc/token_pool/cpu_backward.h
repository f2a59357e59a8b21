// SPDX-License-Identifier: Apache-2.0
// Backward: the attention weights again from x, the weight and the kept logsumexp; then both gradients.
//
// Work split: a task is a part of the pixels of an image. Its share of the weight's gradient goes to a sheet of its
// own; one row of the weight is then a task that adds up the sheets in their order.
// Memory: x is read once. A block of pixels gives the products with weights and gradients, lanes along the tokens,
// from which follow A and f, eqs. (2) and (6). Then panel by panel of channels the gradient of the weight takes f x,
// eq. (8), and that of x is written, eq. (7): one product of [A, f] with the stacked rows of gradient and weight.
#pragma once

#include "token_pool/cpu_forward.h"

namespace vitkern::VITKERN_ISA {
namespace {

template <typename T>
struct PoolBackwardWorker {
  using Acc = Accumulator<T>;
  PackedTokens<T> weight, gradient;
  RowBlock<T> rows;
  int64_t image;                 // that the four below are of
  int64_t tokens, stride;        // T, and T in whole vectors
  Acc* stacked;                  // [panels of C][gradients and weights of T tokens][kPanel]
  Acc* logsumexp;                // [stride]
  Acc* delta;                    // [stride], eq. (5)
  Acc *logits, *dots;            // [pixels of a block, stride]: products with weight and gradient
  Acc* attention;                // [pixels of a block, attention_stride]: A of T tokens, then f of T tokens
  int64_t attention_stride;

  void lay_out(Cursor& cursor, const TokenPoolParams& p, const PixelSplit& split) {
    weight.lay_out(cursor, p);
    gradient.lay_out(cursor, p);
    rows.lay_out(cursor, split.block, p.channels);
    image = -1;
    tokens = p.tokens;
    stride = whole_vectors<Acc>(tokens);
    stacked = cursor.take<Acc>(p.grad_x ? 2 * tokens * panels<Acc>(p.channels) * kPanel<Acc> : 0);
    logsumexp = cursor.take<Acc>(stride);
    delta = cursor.take<Acc>(stride);
    logits = cursor.take<Acc>(split.block * stride);
    dots = cursor.take<Acc>(split.block * stride);
    attention_stride = tokens + stride;
    attention = cursor.take<Acc>(split.block * attention_stride);
  }
};

// What all pixels of an image need.
template <typename T>
void take_image(const TokenPoolParams& p, PoolBackwardWorker<T>& worker, int64_t image) {
  using Acc = Accumulator<T>;
  if (worker.image == image) return;
  worker.image = image;
  const int64_t first = image * p.tokens, channels = p.channels;
  const T* const weight = weight_of_image<T>(p, image);
  const T* const gradient = static_cast<const T*>(p.grad_output) + first * channels;
  const T* const pooled = static_cast<const T*>(p.pooled) + first * channels;
  worker.weight.pack(weight);
  worker.gradient.pack(gradient);
  for (int64_t token = 0; token < worker.stride; ++token) {
    const bool there = token < p.tokens;
    worker.logsumexp[token] = there ? static_cast<const Acc*>(p.logsumexp)[first + token] : 0;
    worker.delta[token] = there ? dot(gradient + token * channels, pooled + token * channels, channels) : 0;
  }
  if (!p.grad_x) return;
  for (int64_t channel = 0; channel < channels; channel += kPanel<Acc>) {
    Acc* const panel = worker.stacked + 2 * p.tokens * channel;
    const int64_t columns = smaller(kPanel<Acc>, channels - channel);
    pack_rows(gradient + channel, channels, p.tokens, columns, panel);
    pack_rows(weight + channel, channels, p.tokens, columns, panel + p.tokens * kPanel<Acc>);
  }
}

// Rows of [A, f]. What whole vectors write beyond the T numbers of A, those of f overwrite.
template <typename T>
void attend_again(const PoolBackwardWorker<T>& worker, int64_t count) {
  using Acc = Accumulator<T>;
  constexpr int N = kLanes<Acc>;
  for (int64_t row = 0; row < count; ++row) {
    Acc* const attention = worker.attention + row * worker.attention_stride;
    const Acc* const logits = worker.logits + row * worker.stride;
    const Acc* const dots = worker.dots + row * worker.stride;
    for (int64_t token = 0; token < worker.stride; token += N)
      store(attention + token,
            exp_nonpositive(load<Acc, N>(logits + token) - load<Acc, N>(worker.logsumexp + token)));
    for (int64_t token = 0; token < worker.stride; token += N)
      store(attention + worker.tokens + token,
            load<Acc, N>(attention + token) * (load<Acc, N>(dots + token) - load<Acc, N>(worker.delta + token)));
  }
}

// A part of the pixels: their gradient, and in `sheet` [T, C in whole vectors] their share of that of the weight.
template <typename T>
void backward_part(const TokenPoolParams& p, const PixelSplit& split, PoolBackwardWorker<T>& worker, int64_t task,
                   Accumulator<T>* sheet) {
  using Acc = Accumulator<T>;
  constexpr int N = kLanes<Acc>;
  const int64_t channels = worker.rows.stride, tokens = p.tokens;
  if (sheet) memset(sheet, 0, tokens * channels * sizeof(Acc));
  split.for_blocks(task, [&](int64_t image, int64_t first, int64_t count) {
    take_image(p, worker, image);
    const T* const x = static_cast<const T*>(p.x) + first * p.channels;
    T* const grad_x = static_cast<T*>(p.grad_x) + first * p.channels;
    const Acc* const rows = worker.rows.read(x, count);
    worker.weight.multiply_rows({rows, channels, 1}, count, worker.logits, worker.stride);
    worker.gradient.multiply_rows({rows, channels, 1}, count, worker.dots, worker.stride);
    attend_again(worker, count);
    for (int64_t channel = 0; channel < channels; channel += kPanel<Acc>) {
      prefetch_panel(x, p.channels, count, channel);
      if (sheet)
        multiply_panel<Acc>({worker.attention + tokens, 1, worker.attention_stride}, tokens, rows + channel,
                            channels, channels - channel, count, [&](int64_t token, int64_t column, auto sum) {
                              Acc* const to = sheet + token * channels + channel + column;
                              store(to, load<Acc, N>(to) + sum);
                            });
      if (p.grad_x)
        multiply_panel<Acc>({worker.attention, worker.attention_stride, 1}, count,
                            worker.stacked + 2 * tokens * channel, kPanel<Acc>, channels - channel, 2 * tokens,
                            [&](int64_t row, int64_t column, auto sum) {
                              store_some(grad_x + row * p.channels + channel + column, sum,
                                         p.channels - channel - column);
                            });
    }
  });
}

template <typename T>
void backward(const TokenPoolParams& p) {
  using Acc = Accumulator<T>;
  const PixelSplit split = split_pixels<Acc>(p.batch, p.pixels, p.channels);
  const int workers = worker_count(split.tasks(), p.threads);
  const int64_t padded = whole_vectors<Acc>(p.channels), sheet_size = p.tokens * padded;
  PoolBackwardWorker<T>* worker;
  Acc* sheets;  // [image, part, T, padded]
  const auto lay_out = [&](Cursor& cursor) {
    worker = cursor.take<PoolBackwardWorker<T>>(workers);
    PoolBackwardWorker<T> measured;
    for (int i = 0; i < workers; ++i) (cursor.base ? worker[i] : measured).lay_out(cursor, p, split);
    sheets = cursor.take<Acc>(p.grad_weight ? split.tasks() * sheet_size : 0);
  };
  Cursor measure{nullptr};
  lay_out(measure);
  const Scratch scratch(measure.used);
  Cursor cursor{scratch.data()};
  lay_out(cursor);

  parallel_for(split.tasks(), p.threads, [&](int64_t task, int who) {
    backward_part(p, split, worker[who], task, p.grad_weight ? sheets + task * sheet_size : nullptr);
  });
  if (!p.grad_weight) return;
  const int64_t weights = p.weight_per_image ? p.batch : 1, count = split.tasks() / weights;
  parallel_for(weights * p.tokens, p.threads, [&](int64_t row, int) {
    const int64_t first = row / p.tokens * count * sheet_size + row % p.tokens * padded;
    add_sheets(sheets + first, sheet_size, count, p.channels, static_cast<Acc*>(p.grad_weight) + row * p.channels);
  });
}

}  // namespace
}  // namespace vitkern::VITKERN_ISA
