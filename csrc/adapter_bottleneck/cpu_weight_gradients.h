// SPDX-License-Identifier: Apache-2.0
// The second pass of backward: sums over rows, eqs. (9), (10) and (11), as products of f and a transposed with tiles.
//
// A task owns a stretch of channels and loops over all rows of a chunk in slices of kSlice: each slice is summed in
// registers and added to the running sum. Nothing is merged between workers: every sum follows the order of the rows.
#pragma once

#include "adapter_bottleneck/cpu_products.h"

namespace vitkern::VITKERN_ISA {
namespace {

constexpr int64_t kSlice = 128;       // rows: a panel of x of this length is a quarter of the first cache
constexpr int64_t kChunkSlices = 16;  // x and grad_output of a chunk stay in the third cache
constexpr int64_t kPanelsOfTask = 8;

// Rows of a chunk: enough for all threads in the first pass, which splits them into blocks.
inline int64_t rows_of_chunk(int64_t threads) {
  const int64_t slices = divide_up(2 * threads * kMaxBlock, kSlice);
  return kSlice * (slices > kChunkSlices ? slices : kChunkSlices);
}

// The results of the first pass for each row.
template <typename Acc>
struct Chunk {
  Acc* gradient;   // f: [rows, H padded]
  Acc* activated;  // a: [rows, H padded]
  Acc* product;    // sum over h of a e: [rows]

  void lay_out(Cursor& cursor, int64_t rows, int64_t stride) {
    gradient = cursor.take<Acc>(rows * stride);
    activated = cursor.take<Acc>(rows * stride);
    product = cursor.take<Acc>(rows);
  }
  Chunk from_row(int64_t row, int64_t stride) const {
    return {gradient + row * stride, activated + row * stride, product + row};
  }
};

// The running sums over the chunks.
template <typename Acc>
struct WeightGradients {
  Acc* down;       // f^T x, as panels [C / kPanel, H, kPanel]
  Acc* up;         // a^T grad_output, likewise
  Acc* down_bias;  // [H padded]
  Acc* up_bias;    // [C padded], without the factor s
  double* scale;   // [1], the first sum of eq. (11)

  void lay_out(Cursor& cursor, const Params& p, int64_t channels, int64_t hidden) {
    down = cursor.take<Acc>(p.grad_down_weight ? channels * p.hidden : 0);
    up = cursor.take<Acc>(p.grad_up_weight ? channels * p.hidden : 0);
    down_bias = cursor.take<Acc>(hidden);
    up_bias = cursor.take<Acc>(channels);
    scale = cursor.take<double>(1);
  }
  void clear() {  // the sums are contiguous
    memset(static_cast<void*>(down), 0, reinterpret_cast<char*>(scale + 1) - reinterpret_cast<char*>(down));
  }
};

// Tasks: stretches of x, stretches of grad_output, and one for the sums of hidden units; only for required gradients.
struct WeightTasks {
  int64_t panels, panels_of_task, down, up, hidden;

  WeightTasks(const Params& p, int64_t panels_of_channels)
      : panels(panels_of_channels), panels_of_task(kPanelsOfTask) {
    while (panels_of_task > 1 && panels < 2 * p.threads * panels_of_task) panels_of_task /= 2;
    const int64_t stretches = divide_up(panels, panels_of_task);
    down = p.grad_down_weight ? stretches : 0;
    up = p.grad_up_weight || wants_up_bias(p) ? stretches : 0;
    hidden = p.grad_down_bias || p.grad_scale ? 1 : 0;
  }
  int64_t count() const { return down + up + hidden; }
  static bool wants_up_bias(const Params& p) { return p.grad_up_bias || (p.grad_scale && p.up_bias); }
};

template <typename Acc>
struct ChannelWorker {
  Acc* panels;  // [kPanelsOfTask, kSlice, kPanel]

  void lay_out(Cursor& cursor) { panels = cursor.take<Acc>(kPanelsOfTask * kSlice * kPanel<Acc>); }
};

// to[h, c] += sum over rows of left[row, h] * panel[row, c].
template <typename Acc>
void add_product(const Acc* left, int64_t stride, const Acc* panel, int64_t rows, int64_t hidden, Acc* to) {
  const Strided<Acc> a = {left, 1, stride};  // transposed
  for_tiles(hidden, [=](auto height, int64_t h) {
    const auto sums = multiply<height.value, kPanelVectors>(a.from_row(h), panel, kPanel<Acc>, rows);
    Acc* const tile = to + h * kPanel<Acc>;
    for_sums(sums, [=](int i, int64_t column, auto sum) VITKERN_INLINE_LAMBDA {
      Acc* sum_at = tile + i * kPanel<Acc> + column;
      store(sum_at, sum + load<Acc, kLanes<Acc>>(sum_at));
    });
  });
}

// to[c] += sum over rows of from[row, c], for `columns` columns, whole vectors.
template <typename Acc>
void add_rows(const Acc* from, int64_t stride, int64_t rows, int64_t columns, Acc* to) {
  constexpr int N = kLanes<Acc>;
  constexpr int kSums = 4;  // hide the latency of an addition
  for (int64_t c = 0; c < columns; c += N) {
    Vec<Acc, N> sums[kSums] = {};
    for (int64_t row = 0; row < rows; row += kSums)
      unrolled<kSums>([&](auto i) VITKERN_INLINE_LAMBDA {
        if (row + i.value < rows)
          sums[i.value] = sums[i.value] + load<Acc, N>(from + (row + i.value) * stride + c);
      });
    store(to + c, load<Acc, N>(to + c) + ((sums[0] + sums[1]) + (sums[2] + sums[3])));
  }
}

// Packs rows of x or grad_output into panels [panel, kSlice, kPanel], a few rows of all panels at a time: long reads.
template <typename T>
void pack_slice(const Params& p, const T* from, int64_t rows, int64_t first, int64_t last,
                Accumulator<T>* to) {
  using Acc = Accumulator<T>;
  constexpr int64_t kRows = 8;
  for (int64_t row = 0; row < rows; row += kRows)
    for (int64_t panel = first; panel < last; ++panel)
      pack_rows(from + row * p.channels + panel * kPanel<Acc>, p.channels, smaller(kRows, rows - row),
                panel_columns<Acc>(p.channels, panel), to + ((panel - first) * kSlice + row) * kPanel<Acc>);
}

// A task of the second pass over the `rows` rows from `start` on.
template <typename T, typename Acc>
void add_weight_gradients(const Params& p, const WeightTasks& tasks, int64_t task, int64_t start,
                          int64_t rows, int64_t stride, const Chunk<Acc>& chunk,
                          const ChannelWorker<Acc>& worker, const WeightGradients<Acc>& gradients) {
  const bool hidden = task >= tasks.down + tasks.up, up = task >= tasks.down;
  const T* const source = static_cast<const T*>(up ? p.grad_output : p.x) + start * p.channels;
  const Acc* const left = up ? chunk.activated : chunk.gradient;
  const int64_t first = (up ? task - tasks.down : task) * tasks.panels_of_task;
  const int64_t last = hidden ? first : smaller(first + tasks.panels_of_task, tasks.panels);
  const bool product = up ? p.grad_up_weight != nullptr : true;
  const bool sum = up && WeightTasks::wants_up_bias(p);

  for (int64_t row = 0; row < rows; row += kSlice) {
    const int64_t slice = smaller(kSlice, rows - row);
    if (hidden) {
      add_rows(chunk.gradient + row * stride, stride, slice, padded_hidden<T>(p), gradients.down_bias);
      for (int64_t i = row; i < row + slice; ++i) *gradients.scale += chunk.product[i];
    }
    pack_slice(p, source + row * p.channels, slice, first, last, worker.panels);
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t channel = panel * kPanel<Acc>, place = panel * p.hidden * kPanel<Acc>;
      const Acc* const right = worker.panels + (panel - first) * kSlice * kPanel<Acc>;
      if (sum) add_rows(right, kPanel<Acc>, slice, kPanel<Acc>, gradients.up_bias + channel);
      Acc* const to = (up ? gradients.up : gradients.down) + place;
      if (product) add_product(left + row * stride, stride, right, slice, p.hidden, to);
    }
  }
}

// Copies the panels to the gradient tensors.
template <typename T, typename Acc>
void finish_weight_gradients(const Params& p, Acc scale, const WeightGradients<Acc>& gradients) {
  constexpr int N = kLanes<Acc>;
  Acc* const down = static_cast<Acc*>(p.grad_down_weight);
  Acc* const up = static_cast<Acc*>(p.grad_up_weight);
  parallel_for(down || up ? panels<Acc>(p.channels) : 0, p.threads, [&](int64_t panel, int) {
    const int64_t channel = panel * kPanel<Acc>, columns = panel_columns<Acc>(p.channels, panel);
    const int64_t place = channel * p.hidden;
    for (int64_t h = 0; down && h < p.hidden; ++h)
      for (int64_t c = 0; c < columns; c += N)
        store_some<N>(down + h * p.channels + channel + c,
                      load<Acc, N>(gradients.down + place + h * kPanel<Acc> + c), columns - c);
    for (int64_t c = 0; up && c < columns; ++c)
      for (int64_t h = 0; h < p.hidden; ++h)
        up[(channel + c) * p.hidden + h] = scale * gradients.up[place + h * kPanel<Acc> + c];
  });
  if (p.grad_down_bias) memcpy(p.grad_down_bias, gradients.down_bias, p.hidden * sizeof(Acc));
  if (Acc* const up_bias = static_cast<Acc*>(p.grad_up_bias))
    for (int64_t c = 0; c < p.channels; ++c) up_bias[c] = scale * gradients.up_bias[c];
  if (!p.grad_scale) return;
  double total = *gradients.scale;
  for (int64_t c = 0; p.up_bias && c < p.channels; ++c) {
    Acc bias;
    widen_array(static_cast<const T*>(p.up_bias) + c, 1, &bias);
    total += static_cast<double>(bias) * gradients.up_bias[c];
  }
  *static_cast<Acc*>(p.grad_scale) = static_cast<Acc>(total * p.factor);
}

}  // namespace
}  // namespace vitkern::VITKERN_ISA
