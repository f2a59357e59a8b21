// SPDX-License-Identifier: Apache-2.0
// Backward: computes the attention weights again from x, the weight, m and l, then both gradients.
//
// Work split: a task is a part of the pixels of an image and writes its share of the weight's gradient to its own
// sheet; then a task is one row of the weight and adds up the sheets in their order.
// Memory: x is read once. The products of a block of pixels with weights and gradients, lanes along the tokens, give A
// and f, eqs. (2) and (6). Then, panel by panel of channels, f x is added to the gradient of the weight, eq. (8), and
// the gradient of x is written, eq. (7): one product of [A, f] with the stacked rows of gradient and weight.
// Numerics: logits have the same bits as in forward, and the products of (5) are computed as those of (6): f is
// exactly 0 if a token is one pixel.
#pragma once

#include "token_pool/cpu_forward.h"

namespace vitkern::VITKERN_ISA {
namespace {

template <typename T>
struct PoolBackwardWorker {
  using Acc = Accumulator<T>;
  int64_t image;  // the image of the next seven members
  PackedColumns<Acc> weight, gradient;
  PackedByRows<Acc> stacked;       // gradients of T tokens, then their weight rows
  const Acc* pooled;               // [T, C in whole vectors]
  Acc *largest, *inverse, *delta;  // [stride]: m, 1 / l, eq. (5)
  Acc* f_sums;                     // [stride]: sums of f over a part of the pixels
  int64_t stride;                  // T in whole vectors
  RowBlock<T> rows, grad_rows, tokens;
  Acc *logits, *dots;  // [pixels of a block, stride]: products with weight and gradient
  Acc* attention;      // [pixels of a block, attention_stride]: A of T tokens, then f of T tokens
  int64_t attention_stride;

  void lay_out(Cursor& cursor, const TokenPoolParams& p, const PixelSplit& split) {
    image = -1;
    weight.lay_out(cursor, p.tokens, p.channels);
    gradient.lay_out(cursor, p.tokens, p.channels);
    stacked.lay_out(cursor, p.grad_x ? 2 * p.tokens : 0, p.channels);
    stride = whole_vectors<Acc>(p.tokens);
    largest = cursor.take<Acc>(stride);
    inverse = cursor.take<Acc>(stride);
    delta = cursor.take<Acc>(stride);
    f_sums = cursor.take<Acc>(stride);
    tokens.lay_out(cursor, p.tokens, p.channels);
    rows.lay_out(cursor, split.block, p.channels);
    grad_rows.lay_out(cursor, p.grad_x ? split.block : 0, p.channels);
    logits = cursor.take<Acc>(split.block * stride);
    dots = cursor.take<Acc>(split.block * stride);
    attention_stride = p.tokens + stride;
    attention = cursor.take<Acc>(split.block * attention_stride);
  }
};

// Eq. (5): the same product as a block's with gradients, with tokens in place of pixels.
template <typename T>
void take_deltas(const PoolBackwardWorker<T>& worker, int64_t tokens) {
  using Acc = Accumulator<T>;
  constexpr int64_t kRows = 4;  // the tokens of a panel are a multiple of kRows
  static_assert(kPanel<Acc> % kRows == 0);
  const int64_t channels = worker.tokens.stride;
  Acc dots[kRows * kPanel<Acc>];
  for (int64_t first = 0; first < tokens; first += kRows) {
    const int64_t count = smaller(kRows, tokens - first), column = first % kPanel<Acc>;
    worker.gradient.multiply_some(worker.pooled + first * channels, channels, count, first - column, dots,
                                  kPanel<Acc>);
    for (int64_t i = 0; i < count; ++i) worker.delta[first + i] = dots[i * kPanel<Acc> + column + i];
  }
}

// Prepares the data that all pixels of an image share.
template <typename T>
void take_image(const TokenPoolParams& p, PoolBackwardWorker<T>& worker, int64_t image) {
  using Acc = Accumulator<T>;
  if (worker.image == image) return;
  worker.image = image;
  const int64_t first = image * p.tokens, channels = p.channels;
  const T* const weight = weight_of_image<T>(p, image);
  const T* const gradient = static_cast<const T*>(p.grad_output) + first * channels;
  const Acc* const statistics = static_cast<const Acc*>(p.statistics) + 2 * first;
  worker.pooled = worker.tokens.read(static_cast<const T*>(p.pooled) + first * channels, p.tokens);
  worker.weight.pack(weight);
  worker.gradient.pack(gradient);
  memset(worker.delta, 0, worker.stride * sizeof(Acc));
  take_deltas(worker, p.tokens);
  for (int64_t token = 0; token < worker.stride; ++token) {
    const bool there = token < p.tokens;
    worker.largest[token] = there ? statistics[token] : 0;
    worker.inverse[token] = there ? 1 / statistics[p.tokens + token] : 0;
  }
  if (!p.grad_x) return;
  worker.stacked.pack_some(gradient, 0, p.tokens);
  worker.stacked.pack_some(weight, p.tokens, p.tokens);
}

// Rows of [A, f], and the sums of f. f overwrites the lanes that whole vectors of A write beyond T.
template <typename T>
void attend_again(const PoolBackwardWorker<T>& worker, int64_t tokens, int64_t count) {
  using Acc = Accumulator<T>;
  constexpr int N = kLanes<Acc>;
  for (int64_t row = 0; row < count; ++row) {
    Acc* const attention = worker.attention + row * worker.attention_stride;
    const Acc* const logits = worker.logits + row * worker.stride;
    const Acc* const dots = worker.dots + row * worker.stride;
    for (int64_t token = 0; token < worker.stride; token += N) {
      const auto weight =
          exp_nonpositive(load<Acc, N>(logits + token) - load<Acc, N>(worker.largest + token));
      store(attention + token, weight * load<Acc, N>(worker.inverse + token));
    }
    for (int64_t token = 0; token < worker.stride; token += N) {
      const auto difference = load<Acc, N>(dots + token) - load<Acc, N>(worker.delta + token);
      const auto f = load<Acc, N>(attention + token) * difference;
      store(attention + tokens + token, f);
      store(worker.f_sums + token, load<Acc, N>(worker.f_sums + token) + f);
    }
  }
}

// Eq. (9): subtracts the tokens from the pixels in the products with f, which cancels the rounding of f.
template <typename Acc>
void subtract_tokens(const Acc* f_sums, const Acc* pooled, int64_t tokens, int64_t channels, Acc* sheet) {
  constexpr int N = kLanes<Acc>;
  for (int64_t token = 0; token < tokens; ++token)
    for (int64_t at = token * channels; at < (token + 1) * channels; at += N)
      store(sheet + at,
            load<Acc, N>(sheet + at) - broadcast<Acc, N>(f_sums[token]) * load<Acc, N>(pooled + at));
}

// A part of the pixels: writes their gradient, and in `sheet` [T, C in whole vectors] their share of the weight's.
template <typename T>
void backward_part(const TokenPoolParams& p, const PixelSplit& split, PoolBackwardWorker<T>& worker,
                   int64_t task, Accumulator<T>* sheet) {
  using Acc = Accumulator<T>;
  const int64_t channels = worker.rows.stride;
  if (sheet) memset(sheet, 0, p.tokens * channels * sizeof(Acc));
  memset(worker.f_sums, 0, worker.stride * sizeof(Acc));
  take_image(p, worker, task / split.parts);
  split.for_blocks(task, [&](int64_t, int64_t first, int64_t count) {
    const T* const x = static_cast<const T*>(p.x) + first * p.channels;
    T* const grad_x = p.grad_x ? static_cast<T*>(p.grad_x) + first * p.channels : nullptr;
    const Acc* const rows = worker.rows.read(x, count);
    Acc* const grad_rows = worker.grad_rows.target(grad_x);
    worker.weight.multiply(rows, channels, count, worker.logits, worker.stride);
    worker.gradient.multiply(rows, channels, count, worker.dots, worker.stride);
    attend_again(worker, p.tokens, count);
    for (int64_t channel = 0; channel < channels; channel += kPanel<Acc>) {
      prefetch_panel(x, p.channels, count, channel);
      if (sheet)
        add_products(worker.attention + p.tokens, worker.attention_stride, p.tokens, rows, channels, count,
                     channel, sheet);
      if (p.grad_x)
        worker.stacked.multiply(worker.attention, worker.attention_stride, count, channel, nullptr,
                                grad_rows);
    }
    if (p.grad_x) worker.grad_rows.write(grad_x, count);
  });
  if (sheet) subtract_tokens(worker.f_sums, worker.pooled, p.tokens, channels, sheet);
}

template <typename T>
void backward(const TokenPoolParams& p) {
  using Acc = Accumulator<T>;
  const PixelSplit split = split_pixels<Acc>(p.batch, p.pixels, p.channels, 24);
  const int64_t padded = whole_vectors<Acc>(p.channels), sheet_size = p.tokens * padded;
  PoolBackwardWorker<T>* workers;
  Acc* sheets;  // [image, part, T, padded]
  const Arena arena([&](Cursor& cursor) {
    workers = take_each<PoolBackwardWorker<T>>(cursor, worker_count(split.tasks(), p.threads),
                                               [&](auto& worker) { worker.lay_out(cursor, p, split); });
    sheets = cursor.take<Acc>(p.grad_weight ? split.tasks() * sheet_size : 0);
  });

  if (p.grad_x) prefer_huge_pages(p.grad_x, p.batch * p.pixels * p.channels * sizeof(T));
  parallel_for(split.tasks(), p.threads, [&](int64_t task, int who) {
    backward_part(p, split, workers[who], task, p.grad_weight ? sheets + task * sheet_size : nullptr);
  });
  if (!p.grad_weight) return;
  const int64_t weights = p.weight_per_image ? p.batch : 1;
  const int64_t count = weights > 0 ? split.tasks() / weights : 0;
  parallel_for(weights * p.tokens, p.threads, [&](int64_t row, int) {
    const Acc* const first = sheets + row / p.tokens * count * sheet_size + row % p.tokens * padded;
    add_sheets(first, sheet_size, count, p.channels, static_cast<Acc*>(p.grad_weight) + row * p.channels);
  });
}

}  // namespace
}  // namespace vitkern::VITKERN_ISA
