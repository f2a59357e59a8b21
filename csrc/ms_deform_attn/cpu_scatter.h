// SPDX-License-Identifier: Apache-2.0
// Backward of a stretch of queries: dots of grad_output with the rows of the corners, from which follow the
// gradients of weights and locations, eqs. (6) and (7), and shares of grad_output added to the gradients of
// those rows, eq. (5). cpu_backward.h says who runs it on what.
#pragma once

#include "ms_deform_attn/cpu_forward.h"

namespace vitkern::VITKERN_ISA {
namespace {

// Between value and slab: a load waits for earlier stores at the same offset in another page, which would be
// those to the gradient of the same row.
constexpr int64_t kHalfPage = 2048;

// Levels whose gradients one task adds up: one level, or all of them where levels share pixels.
struct Group {
  const Level* levels;
  int64_t count;
  int64_t first_pixel, pixels;
};

// Whether anything but the gradient of value is wanted.
inline bool wants_points(const MsDeformAttnParams& p) {
  return p.grad_locations || p.grad_weights || p.grad_places;
}

template <typename T>
struct BackwardWorker {
  using Acc = Accumulator<T>;
  Tile<Acc> tile;
  Fusion<Acc> fusion;
  int64_t channels;  // padded to whole vectors
  Acc* grad_output;  // [tile queries, channels]
  Acc* dots;         // [tile points, corners]: grad_output times the row of the corner
  Acc* grad_weight;  // [tile points]
  Acc* value;        // [pixels of a group, channels]
  Acc* slab;         // [pixels of a group, channels]
  Acc* nowhere;      // [channels] takes what corners outside would add

  void lay_out(Cursor& cursor, const MsDeformAttnParams& p, int64_t padded, int64_t value_rows,
               int64_t slab_rows) {
    channels = padded;
    tile.lay_out(cursor, p.points);
    fusion.lay_out(cursor, p);
    const int64_t points = p.points < kTilePoints ? kTilePoints : p.points;
    grad_output = cursor.take<Acc>(kTileQueries * channels);
    dots = cursor.take<Acc>((points + kLanes<Acc>)*kCorners);
    grad_weight = cursor.take<Acc>(points + kLanes<Acc>);
    nowhere = cursor.take<Acc>(channels);
    value = cursor.take<Acc>(value_rows * channels);
    cursor.take<char>(kHalfPage);
    slab = cursor.take<Acc>(slab_rows * channels);
  }
};

// One query, kVectors vectors of channels: dots with the rows, and shares of grad_output into the slab.
template <int kVectors, int kUsed, bool kScatter, bool kDots, typename T, typename Row, typename Acc>
void scatter(const BackwardWorker<T>& worker, const Rows<const Row>& value, const Rows<Acc>& grad,
             int64_t query, int64_t channel) {
  constexpr int N = kLanes<Acc>;
  const Tile<Acc> tile = worker.tile;  // a copy, which the stores below cannot change
  const Rows<const Row> value_rows = value;
  const Rows<Acc> grad_rows = grad;
  Acc* dots = worker.dots + query * tile.points * kCorners;
  Vec<Acc, N> grad_output[kVectors];
  VITKERN_UNROLL
  for (int i = 0; i < kVectors; ++i)
    grad_output[i] = load<Acc, N>(worker.grad_output + query * worker.channels + channel + i * N);

  for (int64_t point = query * tile.points; point < (query + 1) * tile.points; ++point, dots += kCorners) {
    Vec<Acc, N> products[kCorners] = {};
    for (int corner = 0; corner < kUsed; ++corner) {
      const int64_t row = tile.row[corner][point];
      if constexpr (kDots) {
        const Row* from = value_rows.at(row) + channel;
        for (int i = 0; i < kVectors; ++i)
          products[corner] = multiply_add(load_wide<N>(from + i * N), grad_output[i], products[corner]);
      }
      if constexpr (kScatter) {
        const auto share = broadcast<Acc, N>(tile.coefficient[corner][point]);
        Acc* to = grad_rows.at(row) + channel;
        for (int i = 0; i < kVectors; ++i)
          store(to + i * N, multiply_add(share, grad_output[i], load<Acc, N>(to + i * N)));
      }
    }
    if constexpr (kDots) {
      const auto sums = sum_each(products[0], products[1], products[2], products[3]);
      store(dots, channel == 0 ? sums : sums + load<Acc, 4>(dots));
    }
  }
}

template <int kUsed, bool kScatter, bool kDots, typename T, typename Row, typename Acc>
void scatter_all(const BackwardWorker<T>& worker, const Rows<const Row>& value, const Rows<Acc>& grad,
                 int64_t query) {
  constexpr int N = kLanes<Acc>;
  const int64_t channels = worker.channels;
  int64_t channel = 0;
  for (; channel + 4 * N <= channels; channel += 4 * N)
    scatter<4, kUsed, kScatter, kDots>(worker, value, grad, query, channel);
  for (; channel + 2 * N <= channels; channel += 2 * N)
    scatter<2, kUsed, kScatter, kDots>(worker, value, grad, query, channel);
  for (; channel < channels; channel += N)
    scatter<1, kUsed, kScatter, kDots>(worker, value, grad, query, channel);
}

// From the dots of each corner to the gradients of weight, eq. (6), and location (into tile.xy), eq. (7).
template <int kUsed, typename Acc>
void finish_points(Tile<Acc>& tile, const Acc* dots, Acc* grad_weight) {
  using Index = Integer<Acc>;
  for (int64_t i = 0; i < tile.padded; ++i) {
    Acc dot[kCorners] = {};
    bool touched = false;
    for (int corner = 0; corner < kUsed; ++corner) {
      const bool inside = tile.row[corner][i] >= Index{0};
      dot[corner] = inside ? dots[i * kCorners + corner] : Acc{0};
      touched |= inside;
    }
    if constexpr (kUsed == 1) {
      grad_weight[i] = dot[0];
      tile.xy[2 * i] = tile.xy[2 * i + 1] = 0;
    } else {
      const Acc right = tile.x[i], bottom = tile.y[i], left = 1 - right, top = 1 - bottom;
      const Acc slope_x = top * (dot[1] - dot[0]) + bottom * (dot[3] - dot[2]);
      const Acc slope_y = left * (dot[2] - dot[0]) + right * (dot[3] - dot[1]);
      const Acc weight = tile.weight[i];
      tile.xy[2 * i] = touched ? weight * tile.unit_x[i] * slope_x : Acc{0};
      tile.xy[2 * i + 1] = touched ? weight * tile.unit_y[i] * slope_y : Acc{0};
      grad_weight[i] = top * (left * dot[0] + right * dot[1]) + bottom * (left * dot[2] + right * dot[3]);
    }
  }
}

// Gradients of the tile to their places; those of weights to where finish_logits() takes them, if it does.
template <typename C, typename T>
void write_points(const BackwardWorker<T>& worker, const MsDeformAttnParams& p, int64_t row, int64_t stride,
                  int64_t queries) {
  using Acc = Accumulator<T>;
  const Tile<Acc>& tile = worker.tile;
  const Fusion<Acc>& fusion = worker.fusion;
  for (int64_t query = 0; query < queries; ++query) {
    const int64_t to = row + query * stride, from = query * tile.points;
    if (p.grad_locations)
      narrow_array(tile.xy + 2 * from, 2 * tile.points, static_cast<C*>(p.grad_locations) + 2 * to);
    if (p.grad_places)
      narrow_array(fusion.places + 2 * from, 2 * tile.points, static_cast<Acc*>(p.grad_places) + 2 * to);
    if (fusion.grad_weights)
      narrow_array(worker.grad_weight + from, tile.points, fusion.grad_weights + to);
    else if (p.grad_weights)
      narrow_array(worker.grad_weight + from, tile.points, static_cast<C*>(p.grad_weights) + to);
  }
}

// Queries [begin, end) of one head, points of one group.
template <int kUsed, typename T, typename C, typename Row>
void backward_queries(const MsDeformAttnParams& p, BackwardWorker<T>& worker, const Rows<const Row>& value,
                      const Rows<Accumulator<T>>& grad, const Group& group, int64_t image, int64_t head,
                      int64_t begin, int64_t end) {
  Tile<Accumulator<T>>& tile = worker.tile;
  const bool scatters = p.grad_value, dots = wants_points(p);
  const int64_t row_bytes = p.channels * sizeof(Row), grad_bytes = p.channels * sizeof(Accumulator<T>);
  for (int64_t first = begin; first < end; first += tile.queries) {
    const int64_t queries = end - first < tile.queries ? end - first : tile.queries;
    const int64_t row = (image * p.queries + first) * p.heads + head;
    const int64_t first_point = row * p.points + (group.count ? group.levels->first_point : 0);
    read_points<C>(tile, p, first_point, p.heads * p.points, queries);
    if (p.reference.points) fuse_points(worker.fusion, tile, p, image, head, first, queries);
    if constexpr (kUsed == kCorners)
      locate_bilinear(tile);
    else
      locate_nearest(tile);
    const T* grad_output = static_cast<const T*>(p.grad_output) + row * p.channels;
    for (int64_t query = 0; query < queries; ++query)
      widen_array(grad_output + query * p.heads * p.channels, p.channels,
                  worker.grad_output + query * worker.channels);

    const bool far = scattered(tile, queries);
    for (int64_t query = 0; query < queries; ++query) {
      prefetch_points<C>(p, first_point + (query + tile.queries) * p.heads * p.points, tile.points);
      prefetch_row(grad_output + (query + tile.queries) * p.heads * p.channels, p.channels);
      if (p.reference.points)
        prefetch_references<Accumulator<T>>(p.reference, image, first + tile.queries + query);
      if (far && query + kAhead < queries) {
        prefetch_rows<kUsed>(tile, query + kAhead, value, row_bytes);
        if (scatters) prefetch_rows<kUsed>(tile, query + kAhead, grad, grad_bytes);
      }
      if (scatters && dots)
        scatter_all<kUsed, true, true>(worker, value, grad, query);
      else if (scatters)
        scatter_all<kUsed, true, false>(worker, value, grad, query);
      else
        scatter_all<kUsed, false, true>(worker, value, grad, query);
    }
    if (!dots) continue;
    finish_points<kUsed>(tile, worker.dots, worker.grad_weight);
    if (p.reference.points) unfuse_points(worker.fusion, tile, p, queries, worker.grad_weight);
    write_points<C>(worker, p, first_point, p.heads * p.points, queries);
  }
}

}  // namespace
}  // namespace vitkern::VITKERN_ISA
