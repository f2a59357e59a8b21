// SPDX-License-Identifier: Apache-2.0
// Backward, eqs. (6) to (11), in two passes over a chunk of rows.
//
// Work split: in the first pass a task is a block of rows and computes e, f, a and the gradient of x; in the second a
// task is a stretch of channels and multiplies f and a with all rows of x and grad_output (cpu_weight_gradients.h). A
// chunk is small enough that the second pass reads x and grad_output from a cache.
// Memory: scratch holds a and f of a chunk and running sums of the weights' gradients. grad_output is read three
// times if the gradient of x includes it, else twice, one of these from memory; x once, or twice if z was not kept.
// Numerics: the order of every sum is fixed; it depends neither on threads nor on how rows are split among them.
#pragma once

#include "adapter_bottleneck/cpu_forward.h"
#include "adapter_bottleneck/cpu_weight_gradients.h"

namespace vitkern::VITKERN_ISA {
namespace {

template <typename T>
struct BackwardWorker {
  using Acc = Accumulator<T>;
  ForwardWorker<T> forward;
  Acc* upstream;  // e of eq. (6): [block, H padded]

  void lay_out(Cursor& cursor, const Params& p) {
    forward.lay_out(cursor, p);
    upstream = cursor.take<Acc>(kMaxBlock * hidden_stride<T>(p));
  }
};

template <typename T>
struct BackwardScratch {
  using Acc = Accumulator<T>;
  Acc* down;        // panels of [C, H] made of down_weight, for z
  Acc* up;          // panels of [C, H] made of up_weight, for e
  Acc* down_again;  // panels of [H, C] made of down_weight, for the gradient of x
  Acc* down_bias;   // [H padded]
  Chunk<Acc> chunk;
  WeightGradients<Acc> gradients;

  void lay_out(Cursor& cursor, const Params& p, int64_t chunk_rows) {
    const int64_t to_hidden = padded_hidden<T>(p) * p.channels,
                  to_channels = padded_channels<T>(p) * p.hidden;
    down = cursor.take<Acc>(p.kept ? 0 : to_hidden);
    up = cursor.take<Acc>(to_hidden);
    down_again = cursor.take<Acc>(p.grad_x ? to_channels : 0);
    down_bias = cursor.take<Acc>(padded_hidden<T>(p));
    chunk.lay_out(cursor, chunk_rows, hidden_stride<T>(p));
    gradients.lay_out(cursor, p, padded_channels<T>(p), padded_hidden<T>(p));
  }
};

// Computes from z and e of a block: a of eq. (2), f of eq. (7), and each row's share of the first sum of eq. (11).
template <Activation kActivation, typename T, typename Acc>
void activate_block_backward(const Params& p, int64_t first, int64_t rows, const BackwardWorker<T>& worker,
                             Chunk<Acc> chunk) {
  constexpr int N = kLanes<Acc>;
  const int64_t hidden = p.hidden, stride = hidden_stride<T>(p);
  const Acc* factors = nullptr;
  if (p.dropout.seed)
    factors = dropout_factors(p.dropout, first * hidden, rows * hidden, worker.forward.factor);
  const auto scale = broadcast<Acc, N>(scale_of<T>(p)), zero = broadcast<Acc, N>(0);
  for (int64_t row = 0; row < rows; ++row) {
    auto product = zero;
    for (int64_t h = 0; h < hidden; h += N) {
      const auto z = load<Acc, N>(worker.forward.hidden + row * stride + h);
      const auto e = load<Acc, N>(worker.upstream + row * stride + h);
      const auto factor = factors ? load<Acc, N>(factors + row * hidden + h) : broadcast<Acc, N>(1);
      const auto a = activate<kActivation>(z) * factor;
      product = product + select(first_lanes<Acc, N>(hidden - h), a * e, zero);
      store(chunk.activated + row * stride + h, a);
      store(chunk.gradient + row * stride + h, activate_backward<kActivation>(z, scale * e * factor));
    }
    chunk.product[row] = sum(product);
  }
}

// Computes z of a block in worker.hidden.
template <typename T, typename Acc>
void find_hidden(const Params& p, int64_t first, int64_t rows, const BackwardScratch<T>& shared,
                 const ForwardWorker<T>& worker, const Acc* kept) {
  constexpr int N = kLanes<Acc>;
  const int64_t hidden = p.hidden, stride = hidden_stride<T>(p);
  if (kept) {
    for (int64_t row = 0; row < rows; ++row)
      widen_array(kept + (first + row) * hidden, hidden, worker.hidden + row * stride);
    return;
  }
  multiply_to_hidden(p, static_cast<const T*>(p.x) + first * p.channels, rows, shared.down, worker.wide,
                     worker.hidden);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t h = row * stride; h < row * stride + hidden; h += N)
      store(worker.hidden + h,
            load<Acc, N>(worker.hidden + h) + load<Acc, N>(shared.down_bias + h - row * stride));
}

// The first pass on a block of rows.
template <typename T>
void backward_block(const Params& p, int64_t first, int64_t rows, const BackwardScratch<T>& shared,
                    const BackwardWorker<T>& worker, Chunk<Accumulator<T>> chunk) {
  using Acc = Accumulator<T>;
  const int64_t at = first * p.channels;
  const T* grad_output = static_cast<const T*>(p.grad_output) + at;
  multiply_to_hidden(p, grad_output, rows, shared.up, worker.forward.wide, worker.upstream);
  find_hidden(p, first, rows, shared, worker.forward, static_cast<const Acc*>(p.kept));
  dispatch_activation(p.activation, [&](auto activation) {
    activate_block_backward<activation.value>(p, first, rows, worker, chunk);
  });
  if (!p.grad_x) return;
  const T* added = p.residual_is_x ? grad_output : nullptr;
  const ChannelOutput<T> to = {static_cast<T*>(p.grad_x) + at, added, nullptr, Acc{1}, p.channels};
  multiply_to_channels(p, chunk.gradient, rows, shared.down_again, to);
}

template <typename T>
void pack_weights(const Params& p, const BackwardScratch<T>& shared) {
  using Acc = Accumulator<T>;
  const T* const down_weight = static_cast<const T*>(p.down_weight);
  const T* const up_weight = static_cast<const T*>(p.up_weight);
  const int64_t hidden_panels = panels<Acc>(p.hidden);
  const int64_t z_panels = p.kept ? 0 : hidden_panels;
  const int64_t x_panels = p.grad_x ? panels<Acc>(p.channels) : 0;
  parallel_for(hidden_panels + z_panels + x_panels, p.threads, [&](int64_t task, int) {
    if (task < hidden_panels)
      pack_to_hidden(p, up_weight, false, task, shared.up);
    else if (task < hidden_panels + z_panels)
      pack_to_hidden(p, down_weight, true, task - hidden_panels, shared.down);
    else
      pack_to_channels(p, down_weight, false, task - hidden_panels - z_panels, shared.down_again);
  });
  widen_bias(p.down_bias, p.hidden, padded_hidden<T>(p), T{}, shared.down_bias);
}

template <typename T>
void backward(const Params& p) {
  using Acc = Accumulator<T>;
  const int64_t chunk_rows = smaller(p.rows, rows_of_chunk(p.threads));
  Cursor sizes{nullptr}, worker_sizes{nullptr};
  BackwardScratch<T> shared;
  BackwardWorker<T> worker_arrays;
  ChannelWorker<Acc> channel_arrays;
  shared.lay_out(sizes, p, chunk_rows);
  worker_arrays.lay_out(worker_sizes, p);
  Cursor channel_sizes{nullptr};
  channel_arrays.lay_out(channel_sizes);
  if (worker_sizes.used < channel_sizes.used) worker_sizes.used = channel_sizes.used;
  const Scratch scratch(sizes.used + (p.threads < 1 ? 1 : p.threads) * worker_sizes.used);
  Cursor cursor{scratch.data()};
  shared.lay_out(cursor, p, chunk_rows);
  const auto worker_memory = [&](int worker) {
    return Cursor{scratch.data() + sizes.used + worker * worker_sizes.used};
  };

  pack_weights(p, shared);
  shared.gradients.clear();
  for (int64_t start = 0; start < p.rows; start += chunk_rows) {
    const int64_t rows = smaller(chunk_rows, p.rows - start), block = block_rows(rows, p.threads);
    parallel_for(divide_up(rows, block), p.threads, [&](int64_t task, int index) {
      BackwardWorker<T> worker;
      Cursor own = worker_memory(index);
      worker.lay_out(own, p);
      const int64_t first = task * block;
      backward_block(p, start + first, smaller(block, rows - first), shared, worker,
                     shared.chunk.from_row(first, hidden_stride<T>(p)));
    });
    const WeightTasks tasks(p, panels<Acc>(p.channels));
    parallel_for(tasks.count(), p.threads, [&](int64_t task, int index) {
      ChannelWorker<Acc> worker;
      Cursor own = worker_memory(index);
      worker.lay_out(own);
      add_weight_gradients<T>(p, tasks, task, start, rows, hidden_stride<T>(p), shared.chunk, worker,
                              shared.gradients);
    });
  }
  finish_weight_gradients<T>(p, scale_of<T>(p), shared.gradients);
}

}  // namespace
}  // namespace vitkern::VITKERN_ISA
