// SPDX-License-Identifier: Apache-2.0
// Backward: computes the softmax again from queries and keys, then the required ones of the three gradients.
//
// Work split: a task is a part of the pixels of an image and writes its shares of the gradients of keys and tokens to
// its own sheets; then a task is one row of both gradients and adds up the sheets of the image in their order.
// Memory: queries and gradients of the result are read once, the gradient of the queries is written once.
#pragma once

#include "token_project/cpu_forward.h"

namespace vitkern::VITKERN_ISA {
namespace {

template <typename T>
struct ProjectBackwardWorker {
  using Acc = Accumulator<T>;
  TokenSoftmax<T> softmax;
  PackedColumns<Acc> tokens;
  PackedByRows<Acc> key;
  RowBlock<T> gradient, grad_query;
  Acc* shares;  // [pixels of a block, T in whole vectors]: products h of eq. (3), then f of eq. (4)

  void lay_out(Cursor& cursor, const TokenProjectParams& p, const PixelSplit& split) {
    softmax.lay_out(cursor, p, split);
    tokens.lay_out(cursor, p.token_count, p.channels);
    key.lay_out(cursor, p.token_count, p.keys);
    gradient.lay_out(cursor, split.block, p.channels);
    grad_query.lay_out(cursor, split.block, p.keys);
    shares = cursor.take<Acc>(split.block * softmax.stride);
  }
};

// A part's shares of the gradients of key [T, K] and tokens [T, C], rows in whole vectors; null if not needed.
template <typename Acc>
struct Sheets {
  Acc *key, *tokens;
};

// Turns rows of products h into f, eq. (4).
template <typename Acc>
void softmax_backward(const Acc* weights, int64_t rows, int64_t stride, Acc* shares) {
  constexpr int N = kLanes<Acc>;
  for (int64_t row = 0; row < rows; ++row, weights += stride, shares += stride) {
    Vec<Acc, N> products = {};
    for (int64_t token = 0; token < stride; token += N)
      products = multiply_add(load<Acc, N>(weights + token), load<Acc, N>(shares + token), products);
    const auto mean = broadcast<Acc, N>(sum(products));
    for (int64_t token = 0; token < stride; token += N)
      store(shares + token, load<Acc, N>(weights + token) * (load<Acc, N>(shares + token) - mean));
  }
}

// Eqs. (3) to (6) for a block.
template <typename T>
void backward_block(const TokenProjectParams& p, ProjectBackwardWorker<T>& worker,
                    const Sheets<Accumulator<T>>& sheets, int64_t image, int64_t first, int64_t count) {
  using Acc = Accumulator<T>;
  const int64_t tokens = p.token_count, stride = worker.softmax.stride;
  const int64_t channels = worker.gradient.stride, keys = worker.grad_query.stride;
  const Acc* const weights = worker.softmax.weights;
  const T* const grad_output = from_row<T>(p.grad_output, first, p.channels);
  T* const grad_query = p.grad_query ? static_cast<T*>(p.grad_query) + first * p.keys : nullptr;
  const Acc* const queries = worker.softmax.attend(p, image, first, count);
  const Acc* const gradients = worker.gradient.read(grad_output, count);
  if (p.grad_query || p.grad_key) {
    worker.tokens.pack(from_row<T>(p.tokens, image * tokens, p.channels));
    worker.tokens.multiply(gradients, channels, count, worker.shares, stride);
    softmax_backward(weights, count, stride, worker.shares);
  }
  if (p.grad_query) {
    worker.key.pack(from_row<T>(p.key, image * tokens, p.keys));
    Acc* const target = worker.grad_query.target(grad_query);
    for (int64_t key = 0; key < keys; key += kPanel<Acc>)
      worker.key.multiply(worker.shares, stride, count, key, nullptr, target);
    worker.grad_query.write(grad_query, count);
  }
  if (p.grad_key)
    for (int64_t key = 0; key < keys; key += kPanel<Acc>)
      add_products(worker.shares, stride, tokens, queries, keys, count, key, sheets.key);
  for (int64_t channel = 0; channel < channels; channel += kPanel<Acc>) {
    prefetch_panel(grad_output, p.channels, count, channel);
    if (p.grad_tokens)
      add_products(weights, stride, tokens, gradients, channels, count, channel, sheets.tokens);
  }
}

template <typename T>
void backward(const TokenProjectParams& p) {
  using Acc = Accumulator<T>;
  const PixelSplit split = split_pixels<Acc>(p.batch, p.pixels, p.channels, 24);
  const int64_t keys = whole_vectors<Acc>(p.keys), channels = whole_vectors<Acc>(p.channels);
  const int64_t key_sheet = p.token_count * keys, token_sheet = p.token_count * channels;
  ProjectBackwardWorker<T>* workers;
  Sheets<Acc> sheets;  // [image, part, T, K or C in whole vectors]
  const Arena arena([&](Cursor& cursor) {
    workers = take_each<ProjectBackwardWorker<T>>(cursor, worker_count(split.tasks(), p.threads),
                                                  [&](auto& worker) { worker.lay_out(cursor, p, split); });
    sheets.key = cursor.take<Acc>(p.grad_key ? split.tasks() * key_sheet : 0);
    sheets.tokens = cursor.take<Acc>(p.grad_tokens ? split.tasks() * token_sheet : 0);
  });

  if (p.grad_query) prefer_huge_pages(p.grad_query, p.batch * p.pixels * p.keys * sizeof(T));
  parallel_for(split.tasks(), p.threads, [&](int64_t task, int who) {
    const Sheets<Acc> own = {sheets.key + task * key_sheet, sheets.tokens + task * token_sheet};
    if (p.grad_key) memset(own.key, 0, key_sheet * sizeof(Acc));
    if (p.grad_tokens) memset(own.tokens, 0, token_sheet * sizeof(Acc));
    split.for_blocks(task, [&](int64_t image, int64_t first, int64_t count) {
      backward_block(p, workers[who], own, image, first, count);
    });
  });
  if (!(p.grad_key || p.grad_tokens)) return;
  parallel_for(p.batch * p.token_count, p.threads, [&](int64_t row, int) {
    const int64_t part = row / p.token_count * split.parts, token = row % p.token_count;
    if (p.grad_key)
      add_sheets(sheets.key + part * key_sheet + token * keys, key_sheet, split.parts, p.keys,
                 static_cast<Acc*>(p.grad_key) + row * p.keys);
    if (p.grad_tokens)
      add_sheets(sheets.tokens + part * token_sheet + token * channels, token_sheet, split.parts, p.channels,
                 static_cast<Acc*>(p.grad_tokens) + row * p.channels);
  });
}

}  // namespace
}  // namespace vitkern::VITKERN_ISA
