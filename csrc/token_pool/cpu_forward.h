// SPDX-License-Identifier: Apache-2.0
// Forward: reduces each part of the pixels to the triple (m, l, o) of eq. (4), then an image's parts to its tokens.
//
// Work split: a task is a part of the pixels of an image; then a task is one row of the tokens.
// Memory: x is read once. The logits (1) of a block of pixels are computed with lanes along the tokens; the block is
// summed (3) while it is in the cache, with lanes along the channels, a panel at a time. Each panel's sum prefetches
// that panel of the next block.
// Numerics: sums in the accumulator type. The largest logit of a part is never NaN: a NaN or an infinity enters l and
// from there the whole token, as in torch's softmax.
#pragma once

#include "common/exp.h"
#include "common/parallel.h"
#include "common/pixel_blocks.h"
#include "token_pool/params.h"

namespace vitkern::VITKERN_ISA {
namespace {

template <typename T>
const T* weight_of_image(const TokenPoolParams& p, int64_t image) {
  return static_cast<const T*>(p.weight) + (p.weight_per_image ? image * p.tokens * p.channels : 0);
}

// The number that is subtracted from logits. If all of them are -inf it is finite, and their exp is 0.
template <typename Acc, int N>
VITKERN_INLINE Vec<Acc, N> softmax_shift(Vec<Acc, N> largest) {
  const auto nothing = broadcast<Acc, N>(-kInfinity<Acc>);
  return select(largest == nothing, broadcast<Acc, N>(0), largest);
}

// The triple (m, l, o) of some pixels, for all tokens.
template <typename Acc>
struct Summary {
  int64_t tokens, stride;  // T, and T in whole vectors
  int64_t channels;        // C in whole vectors
  Acc* largest;            // [stride]
  Acc* total;              // [stride]
  Acc* sums;               // [T, channels]

  void lay_out(Cursor& cursor, const TokenPoolParams& p) {
    tokens = p.tokens;
    stride = whole_vectors<Acc>(tokens);
    channels = whole_vectors<Acc>(p.channels);
    largest = cursor.take<Acc>(stride);
    total = cursor.take<Acc>(stride);
    sums = cursor.take<Acc>(tokens * channels);
  }

  void clear() const {
    for (int64_t token = 0; token < stride; ++token) largest[token] = -kInfinity<Acc>;
    memset(total, 0, stride * sizeof(Acc));
    memset(sums, 0, tokens * channels * sizeof(Acc));
  }

  // Rescales for a larger logit. Rare: after n pixels, one in n has one.
  void rescale(const Acc* scales) const {
    constexpr int N = kLanes<Acc>;
    for (int64_t token = 0; token < tokens; ++token) {
      if (scales[token] == 1) continue;
      const auto scale = broadcast<Acc, N>(scales[token]);
      Acc* const row = sums + token * channels;
      for (int64_t channel = 0; channel < channels; channel += N)
        store(row + channel, load<Acc, N>(row + channel) * scale);
    }
  }
};

template <typename T>
struct PoolWorker {
  using Acc = Accumulator<T>;
  PackedColumns<Acc> weight;
  RowBlock<T> rows;
  Acc* weights;          // [pixels of a block, T in whole vectors]: logits, then exp(s - m)
  Acc* scales;           // [T in whole vectors]: exp(m' - m), the factors of the running sums
  Summary<Acc> summary;  // used if an image is one part

  void lay_out(Cursor& cursor, const TokenPoolParams& p, const PixelSplit& split) {
    weight.lay_out(cursor, p.tokens, p.channels);
    rows.lay_out(cursor, split.block, p.channels);
    weights = cursor.take<Acc>(split.block * whole_vectors<Acc>(p.tokens));
    scales = cursor.take<Acc>(whole_vectors<Acc>(p.tokens));
    if (split.parts == 1) summary.lay_out(cursor, p);
  }
};

// Turns the logits of a block into exp(s - m), updates m and l, and computes the factors of the running sums.
template <typename Acc>
void online_softmax(Acc* weights, int64_t count, const Summary<Acc>& summary, Acc* scales) {
  constexpr int N = kLanes<Acc>;
  const int64_t stride = summary.stride;
  for (int64_t token = 0; token < stride; token += N) {
    Acc* const column = weights + token;
    const auto before = load<Acc, N>(summary.largest + token);
    auto largest = before;
    for (int64_t row = 0; row < count; ++row) largest = maximum(load<Acc, N>(column + row * stride), largest);
    const auto shift = softmax_shift(largest), scale = exp_nonpositive(before - shift);
    auto total = load<Acc, N>(summary.total + token) * scale;
    for (int64_t row = 0; row < count; ++row) {
      const auto weight = exp_nonpositive(load<Acc, N>(column + row * stride) - shift);
      store(column + row * stride, weight);
      total = total + weight;
    }
    store(summary.largest + token, largest);
    store(summary.total + token, total);
    store(scales + token, scale);
  }
}

template <typename T>
void pool_part(const TokenPoolParams& p, const PixelSplit& split, PoolWorker<T>& worker, int64_t task,
               const Summary<Accumulator<T>>& summary) {
  using Acc = Accumulator<T>;
  summary.clear();
  split.for_blocks(task, [&](int64_t image, int64_t first, int64_t count) {
    const T* const x = static_cast<const T*>(p.x) + first * p.channels;
    const Acc* const rows = worker.rows.read(x, count);
    worker.weight.pack(weight_of_image<T>(p, image));
    worker.weight.multiply(rows, summary.channels, count, worker.weights, summary.stride);
    online_softmax(worker.weights, count, summary, worker.scales);
    summary.rescale(worker.scales);
    for (int64_t channel = 0; channel < summary.channels; channel += kPanel<Acc>) {
      prefetch_panel(x, p.channels, count, channel);
      add_products(worker.weights, summary.stride, p.tokens, rows, summary.channels, count, channel,
                   summary.sums);
    }
  });
}

// Computes one token of an image from the parts of its pixels in their order, eq. (4).
template <typename T>
void merge_parts(const TokenPoolParams& p, const Summary<Accumulator<T>>* parts, int64_t count, int64_t image,
                 int64_t token) {
  using Acc = Accumulator<T>;
  constexpr int N = kLanes<Acc>;
  const int64_t channels = parts[0].channels, row = image * p.tokens + token;
  auto largest = broadcast<Acc, 1>(-kInfinity<Acc>), total = broadcast<Acc, 1>(0);
  for (int64_t i = 0; i < count; ++i) largest = maximum(load<Acc, 1>(parts[i].largest + token), largest);
  const auto scale_of = [&](const Summary<Acc>& part) {
    return exp_nonpositive(load<Acc, 1>(part.largest + token) - softmax_shift(largest));
  };
  for (int64_t i = 0; i < count; ++i)
    total = multiply_add(load<Acc, 1>(parts[i].total + token), scale_of(parts[i]), total);

  Acc shares[kTasks];
  for (int64_t i = 0; i < count; ++i) shares[i] = sum(scale_of(parts[i]) / total);
  T* const output = static_cast<T*>(p.output) + row * p.channels;
  for (int64_t channel = 0; channel < p.channels; channel += N) {
    Vec<Acc, N> mean = {};
    for (int64_t i = 0; i < count; ++i)
      mean = multiply_add(broadcast<Acc, N>(shares[i]),
                          load<Acc, N>(parts[i].sums + token * channels + channel), mean);
    store_some(output + channel, mean, p.channels - channel);
  }
  Acc* const statistics = static_cast<Acc*>(p.statistics) + image * 2 * p.tokens + token;
  statistics[0] = sum(largest);
  statistics[p.tokens] = sum(total);
}

template <typename T>
void forward(const TokenPoolParams& p) {
  using Acc = Accumulator<T>;
  const PixelSplit split = split_pixels<Acc>(p.batch, p.pixels, p.channels, 48);
  PoolWorker<T>* workers;
  Summary<Acc>* parts;  // [image, part]; none if an image is one part
  const Arena arena([&](Cursor& cursor) {
    workers = take_each<PoolWorker<T>>(cursor, worker_count(split.tasks(), p.threads),
                                       [&](auto& worker) { worker.lay_out(cursor, p, split); });
    parts = take_each<Summary<Acc>>(cursor, split.parts == 1 ? 0 : split.tasks(),
                                    [&](auto& part) { part.lay_out(cursor, p); });
  });

  parallel_for(split.tasks(), p.threads, [&](int64_t task, int who) {
    const Summary<Acc>& summary = split.parts == 1 ? workers[who].summary : parts[task];
    pool_part(p, split, workers[who], task, summary);
    if (split.parts > 1) return;
    for (int64_t token = 0; token < p.tokens; ++token) merge_parts<T>(p, &summary, 1, task, token);
  });
  if (split.parts == 1) return;
  parallel_for(p.batch * p.tokens, p.threads, [&](int64_t task, int) {
    const int64_t image = task / p.tokens;
    merge_parts<T>(p, parts + image * split.parts, split.parts, image, task % p.tokens);
  });
}

}  // namespace
}  // namespace vitkern::VITKERN_ISA
