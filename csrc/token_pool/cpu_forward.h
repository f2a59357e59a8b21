// SPDX-License-Identifier: Apache-2.0
// Forward: each part of the pixels to the triple (m, l, o) of eq. (4), then the parts of an image to its tokens.
//
// Work split: a task is a part of the pixels of an image; then one row of the tokens is a task.
// Memory: x is read once. A block of pixels gives its logits (1), lanes along the tokens, and is added up (3) while
// it is in the cache, lanes along the channels, a panel at a time; beside each panel that of the next block is
// prefetched.
// Numerics: sums in the accumulator type. The greatest logit of a part is never NaN, so a NaN, as an infinity, ends
// in l and from there in all of the token, as in torch's softmax.
#pragma once

#include <math.h>

#include "common/exp.h"
#include "common/parallel.h"
#include "common/pixel_blocks.h"
#include "common/scratch.h"
#include "token_pool/params.h"

namespace vitkern::VITKERN_ISA {
namespace {

inline float natural_log(float x) { return logf(x); }
inline double natural_log(double x) { return log(x); }

template <typename Acc>
constexpr Acc kInfinity = static_cast<Acc>(HUGE_VAL);

// What is subtracted from logits. Where all of them were -inf their exp is 0, as beside any greater one.
template <typename Acc, int N>
VITKERN_INLINE Vec<Acc, N> softmax_shift(Vec<Acc, N> greatest) {
  const auto nothing = broadcast<Acc, N>(-kInfinity<Acc>);
  return select(greatest == nothing, broadcast<Acc, N>(0), greatest);
}

// A matrix [T, C] of an image, which is its own or that of all, with its columns in panels.
template <typename T>
struct PackedTokens {
  using Acc = Accumulator<T>;
  int64_t tokens, channels;
  Acc* panels;  // [panels of tokens][C][kPanel]
  const T* packed;

  void lay_out(Cursor& cursor, const TokenPoolParams& p) {
    tokens = p.tokens;
    channels = p.channels;
    panels = cursor.take<Acc>(VITKERN_ISA::panels<Acc>(tokens) * kPanel<Acc> * channels);
    packed = nullptr;
  }

  // Tasks come in order, so a worker seldom meets another image.
  void pack(const T* from) {
    if (from == packed) return;
    packed = from;
    for (int64_t token = 0; token < tokens; token += kPanel<Acc>)
      pack_columns(from + token * channels, channels, channels, smaller(kPanel<Acc>, tokens - token),
                   panels + token * channels);
  }

  // Products of rows [count, C] with all tokens, to [count, stride].
  void multiply_rows(Strided<Acc> rows, int64_t count, Acc* to, int64_t stride) const {
    for (int64_t token = 0; token < tokens; token += kPanel<Acc>)
      multiply_panel(rows, count, panels + token * channels, kPanel<Acc>, tokens - token, channels,
                     [&](int64_t row, int64_t column, auto sum) { store(to + row * stride + token + column, sum); });
  }
};

template <typename T>
const T* weight_of_image(const TokenPoolParams& p, int64_t image) {
  return static_cast<const T*>(p.weight) + (p.weight_per_image ? image * p.tokens * p.channels : 0);
}

// Columns of one panel of the block after this one.
template <typename T>
VITKERN_INLINE void prefetch_panel(const T* x, int64_t channels, int64_t rows, int64_t channel) {
  const T* next = x + rows * channels + channel;
  for (int64_t row = 0; row < rows; ++row) prefetch(next + row * channels);
}

// The triple (m, l, o) of some pixels, for all tokens.
template <typename Acc>
struct Summary {
  Acc* greatest;  // [T in whole vectors]
  Acc* total;     // likewise
  Acc* sums;      // [T, C in whole vectors]

  void lay_out(Cursor& cursor, int64_t tokens, int64_t channels) {
    greatest = cursor.take<Acc>(whole_vectors<Acc>(tokens));
    total = cursor.take<Acc>(whole_vectors<Acc>(tokens));
    sums = cursor.take<Acc>(tokens * whole_vectors<Acc>(channels));
  }
};

template <typename T>
struct PoolWorker {
  using Acc = Accumulator<T>;
  PackedTokens<T> weight;
  RowBlock<T> rows;
  int64_t tokens, stride;  // T, and T in whole vectors
  Acc* weights;            // [pixels of a block, stride]: logits, then exp(s - m)
  Acc* scale;              // [stride]: exp(m' - m) of what is summed up already
  Summary<Acc> summary;    // where an image is one part

  void lay_out(Cursor& cursor, const TokenPoolParams& p, const PixelSplit& split) {
    weight.lay_out(cursor, p);
    rows.lay_out(cursor, split.block, p.channels);
    tokens = p.tokens;
    stride = whole_vectors<Acc>(tokens);
    weights = cursor.take<Acc>(split.block * stride);
    scale = cursor.take<Acc>(stride);
    summary.lay_out(cursor, split.parts == 1 ? tokens : 0, p.channels);
  }
};

// Logits of a block to exp(s - m), with m and l brought up to date, and how what there was has to be scaled.
template <typename T, typename Acc>
void online_softmax(const PoolWorker<T>& worker, const Summary<Acc>& summary, int64_t count) {
  constexpr int N = kLanes<Acc>;
  for (int64_t token = 0; token < worker.stride; token += N) {
    Acc* const column = worker.weights + token;
    const auto before = load<Acc, N>(summary.greatest + token);
    auto greatest = before;
    for (int64_t row = 0; row < count; ++row)
      greatest = maximum(load<Acc, N>(column + row * worker.stride), greatest);
    const auto shift = softmax_shift(greatest), scale = exp_nonpositive(before - shift);
    auto total = load<Acc, N>(summary.total + token) * scale;
    for (int64_t row = 0; row < count; ++row) {
      const auto weight = exp_nonpositive(load<Acc, N>(column + row * worker.stride) - shift);
      store(column + row * worker.stride, weight);
      total = total + weight;
    }
    store(summary.greatest + token, greatest);
    store(summary.total + token, total);
    store(worker.scale + token, scale);
  }
}

// What was summed up so far, where a greater logit has come. Seldom: after n pixels in one of n.
template <typename T, typename Acc>
void rescale(const PoolWorker<T>& worker, const Summary<Acc>& summary) {
  constexpr int N = kLanes<Acc>;
  for (int64_t token = 0; token < worker.tokens; ++token) {
    if (worker.scale[token] == 1) continue;
    const auto scale = broadcast<Acc, N>(worker.scale[token]);
    Acc* const sums = summary.sums + token * worker.rows.stride;
    for (int64_t channel = 0; channel < worker.rows.stride; channel += N)
      store(sums + channel, load<Acc, N>(sums + channel) * scale);
  }
}

template <typename T>
void pool_part(const TokenPoolParams& p, const PixelSplit& split, PoolWorker<T>& worker, int64_t task,
               const Summary<Accumulator<T>>& summary) {
  using Acc = Accumulator<T>;
  constexpr int N = kLanes<Acc>;
  const int64_t channels = worker.rows.stride;
  for (int64_t token = 0; token < worker.stride; ++token) summary.greatest[token] = -kInfinity<Acc>;
  memset(summary.total, 0, worker.stride * sizeof(Acc));
  memset(summary.sums, 0, worker.tokens * channels * sizeof(Acc));

  split.for_blocks(task, [&](int64_t image, int64_t first, int64_t count) {
    const T* const x = static_cast<const T*>(p.x) + first * p.channels;
    const Acc* const rows = worker.rows.read(x, count);
    worker.weight.pack(weight_of_image<T>(p, image));
    worker.weight.multiply_rows({rows, channels, 1}, count, worker.weights, worker.stride);
    online_softmax(worker, summary, count);
    rescale(worker, summary);
    for (int64_t channel = 0; channel < channels; channel += kPanel<Acc>) {
      prefetch_panel(x, p.channels, count, channel);
      multiply_panel<Acc>({worker.weights, 1, worker.stride}, worker.tokens, rows + channel, channels,
                          channels - channel, count, [&](int64_t token, int64_t column, auto sum) {
                            Acc* const to = summary.sums + token * channels + channel + column;
                            store(to, load<Acc, N>(to) + sum);
                          });
    }
  });
}

// One token of an image from the parts of its pixels, eq. (4), merged in their order into the first.
template <typename T>
void merge_parts(const TokenPoolParams& p, const Summary<Accumulator<T>>* parts, int64_t count, int64_t image,
                 int64_t token) {
  using Acc = Accumulator<T>;
  constexpr int N = kLanes<Acc>;
  const int64_t channels = whole_vectors<Acc>(p.channels), row = image * p.tokens + token;
  auto greatest = broadcast<Acc, 1>(-kInfinity<Acc>), total = broadcast<Acc, 1>(0);
  for (int64_t i = 0; i < count; ++i) greatest = maximum(load<Acc, 1>(parts[i].greatest + token), greatest);
  const auto scale_of = [&](const Summary<Acc>& part) {
    return exp_nonpositive(load<Acc, 1>(part.greatest + token) - softmax_shift(greatest));
  };
  for (int64_t i = 0; i < count; ++i)
    total = multiply_add(load<Acc, 1>(parts[i].total + token), scale_of(parts[i]), total);

  Acc* const sums = parts[0].sums + token * channels;
  for (int64_t i = 0; i < count; ++i) {
    const auto scale = broadcast<Acc, N>(sum(scale_of(parts[i])) / sum(total));
    const Acc* const from = parts[i].sums + token * channels;
    for (int64_t channel = 0; channel < channels; channel += N) {
      const auto part = load<Acc, N>(from + channel) * scale;
      store(sums + channel, i == 0 ? part : load<Acc, N>(sums + channel) + part);
    }
  }
  narrow_array(sums, p.channels, static_cast<T*>(p.output) + row * p.channels);
  static_cast<Acc*>(p.logsumexp)[row] = sum(greatest) + natural_log(sum(total));
}

template <typename T>
void forward(const TokenPoolParams& p) {
  using Acc = Accumulator<T>;
  const PixelSplit split = split_pixels<Acc>(p.batch, p.pixels, p.channels);
  const int workers = worker_count(split.tasks(), p.threads);
  PoolWorker<T>* worker;
  Summary<Acc>* parts;  // [image, part]; none where an image is one part
  const int64_t part_count = split.parts == 1 ? 0 : split.tasks();
  const auto lay_out = [&](Cursor& cursor) {
    worker = cursor.take<PoolWorker<T>>(workers);
    parts = cursor.take<Summary<Acc>>(part_count);
    PoolWorker<T> measured;
    Summary<Acc> part;
    for (int i = 0; i < workers; ++i) (cursor.base ? worker[i] : measured).lay_out(cursor, p, split);
    for (int64_t i = 0; i < part_count; ++i)
      (cursor.base ? parts[i] : part).lay_out(cursor, p.tokens, p.channels);
  };
  Cursor measure{nullptr};
  lay_out(measure);
  const Scratch scratch(measure.used);
  Cursor cursor{scratch.data()};
  lay_out(cursor);

  parallel_for(split.tasks(), p.threads, [&](int64_t task, int who) {
    const Summary<Acc> summary = split.parts == 1 ? worker[who].summary : parts[task];
    pool_part(p, split, worker[who], task, summary);
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
