// SPDX-License-Identifier: Apache-2.0
// Forward: a block's softmax over the tokens (1), then x plus the mean of the tokens (2).
//
// Work split: a task is a part of the pixels of an image.
// Memory: x and queries are read once, the result is written once; each worker packs the keys and tokens of its images
// once.
// Numerics: sums in the accumulator type; NaN and infinities spread in a pixel as in torch's softmax.
#pragma once

#include "common/exp.h"
#include "common/parallel.h"
#include "common/pixel_blocks.h"
#include "token_project/params.h"

namespace vitkern::VITKERN_ISA {
namespace {

// The rows from `first` on of a matrix.
template <typename T>
const T* from_row(const void* matrix, int64_t first, int64_t columns) {
  return static_cast<const T*>(matrix) + first * columns;
}

// The softmax over the tokens for a block of pixels, for forward and backward.
template <typename T>
struct TokenSoftmax {
  using Acc = Accumulator<T>;
  PackedColumns<Acc> key;
  RowBlock<T> query;
  int64_t count, stride;  // T, and T in whole vectors
  Acc* weights;           // [pixels of a block, stride]: logits, then their softmax

  void lay_out(Cursor& cursor, const TokenProjectParams& p, const PixelSplit& split) {
    key.lay_out(cursor, p.token_count, p.keys);
    query.lay_out(cursor, split.block, p.keys);
    count = p.token_count;
    stride = whole_vectors<Acc>(count);
    weights = cursor.take<Acc>(split.block * stride);
  }

  // Computes the weights of `rows` pixels, 0 in the lanes beyond the last token; returns the queries as accumulators.
  const Acc* attend(const TokenProjectParams& p, int64_t image, int64_t first, int64_t rows) {
    key.pack(from_row<T>(p.key, image * count, p.keys));
    const Acc* const queries = query.read(from_row<T>(p.query, first, p.keys), rows);
    key.multiply(queries, query.stride, rows, weights, stride);
    for (int64_t row = 0; row < rows; ++row) softmax(weights + row * stride);
    return queries;
  }

  void softmax(Acc* row) const {
    constexpr int N = kLanes<Acc>;
    const auto nothing = broadcast<Acc, N>(-kInfinity<Acc>);
    const auto logit = [&](int64_t token) VITKERN_INLINE_LAMBDA {
      return select(first_lanes<Acc, N>(count - token), load<Acc, N>(row + token), nothing);
    };
    auto largest = nothing;
    for (int64_t token = 0; token < stride; token += N) largest = maximum(logit(token), largest);
    const auto shift = broadcast<Acc, N>(largest_lane(largest));
    Vec<Acc, N> powers = {};
    for (int64_t token = 0; token < stride; token += N) {
      const auto power = exp_nonpositive(logit(token) - shift);
      store(row + token, power);
      powers = powers + power;
    }
    const auto scale = broadcast<Acc, N>(1 / sum(powers));
    for (int64_t token = 0; token < stride; token += N) store(row + token, load<Acc, N>(row + token) * scale);
  }
};

template <typename T>
struct ProjectWorker {
  TokenSoftmax<T> softmax;
  PackedByRows<Accumulator<T>> tokens;
  RowBlock<T> x, output;

  void lay_out(Cursor& cursor, const TokenProjectParams& p, const PixelSplit& split) {
    softmax.lay_out(cursor, p, split);
    tokens.lay_out(cursor, p.token_count, p.channels);
    x.lay_out(cursor, split.block, p.channels);
    output.lay_out(cursor, split.block, p.channels);
  }
};

template <typename T>
void project_part(const TokenProjectParams& p, const PixelSplit& split, ProjectWorker<T>& worker,
                  int64_t task) {
  using Acc = Accumulator<T>;
  const int64_t stride = worker.x.stride;
  split.for_blocks(task, [&](int64_t image, int64_t first, int64_t count) {
    worker.softmax.attend(p, image, first, count);
    worker.tokens.pack(from_row<T>(p.tokens, image * p.token_count, p.channels));
    const T* const x = from_row<T>(p.x, first, p.channels);
    T* const output = static_cast<T*>(p.output) + first * p.channels;
    const Acc* const rows = worker.x.read(x, count);
    Acc* const sums = worker.output.target(output);
    for (int64_t channel = 0; channel < stride; channel += kPanel<Acc>) {
      prefetch_panel(x, p.channels, count, channel);
      worker.tokens.multiply(worker.softmax.weights, worker.softmax.stride, count, channel, rows, sums);
    }
    worker.output.write(output, count);
  });
}

template <typename T>
void forward(const TokenProjectParams& p) {
  const PixelSplit split = split_pixels<Accumulator<T>>(p.batch, p.pixels, p.channels, 0);
  ProjectWorker<T>* workers;
  const Arena arena([&](Cursor& cursor) {
    workers = take_each<ProjectWorker<T>>(cursor, worker_count(split.tasks(), p.threads),
                                          [&](auto& worker) { worker.lay_out(cursor, p, split); });
  });
  prefer_huge_pages(p.output, p.batch * p.pixels * p.channels * sizeof(T));
  parallel_for(split.tasks(), p.threads,
               [&](int64_t task, int who) { project_part(p, split, workers[who], task); });
}

}  // namespace
}  // namespace vitkern::VITKERN_ISA
