// SPDX-License-Identifier: Apache-2.0
// Backward of a stretch of queries: dots of grad_output with the rows of the corners, from which follow the
// gradients of weights and locations, eqs. (6) and (7), and shares of grad_output added to the gradients of
// those rows, eq. (5). cpu_backward.h has the work split.
#pragma once

#include "common/shuffle.h"
#include "ms_deform_attn/cpu_forward.h"

namespace vitkern::VITKERN_ISA {
namespace {

// The gap between value and slab: a load waits for earlier stores at the same offset in another page; without the gap
// these would be the stores to the gradient of the same row.
constexpr int64_t kHalfPage = 2048;

// Levels whose gradients one task adds up: one level, or all of them where levels share pixels.
struct Group {
  const Level* levels;
  int64_t count;
  int64_t first_pixel, pixels;
  int64_t first_row;  // of a slab that holds a row for corners outside and then the pixels of each group
};

// Whether a gradient other than that of value is needed.
inline bool wants_points(const MsDeformAttnParams& p) {
  return p.grad_locations || p.grad_weights || p.grad_computed;
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
  Acc* value;        // [1 + pixels of a group, channels], the first for corners outside
  Acc* slab;         // the same

  void lay_out(Cursor& cursor, const MsDeformAttnParams& p, int64_t padded, int64_t value_rows,
               int64_t slab_rows) {
    channels = padded;
    tile.lay_out(cursor, p.points);
    fusion.lay_out(cursor, p);
    const int64_t points = p.points < kTilePoints ? kTilePoints : p.points;
    grad_output = cursor.take<Acc>(kTileQueries * channels);
    dots = cursor.take<Acc>((points + kLanes<Acc>)*kCorners);
    grad_weight = cursor.take<Acc>(points + kLanes<Acc>);
    value = cursor.take<Acc>(value_rows * channels);
    cursor.take<char>(kHalfPage);
    slab = cursor.take<Acc>(slab_rows * channels);
  }
};

// One query, kVectors vectors of channels from `channel` on: dots with the rows, and shares of grad_output into the
// gradients of the rows. Both kinds of rows begin at this channel.
template <int kVectors, int kUsed, bool kScatter, bool kDots, typename T, typename Values, typename Gradients>
void scatter(const BackwardWorker<T>& worker, const Values values, const Gradients gradients, int64_t query,
             int64_t channel) {
  using Acc = Accumulator<T>;
  constexpr int N = kLanes<Acc>;
  const Tile<Acc> tile = worker.tile;  // a copy, which the stores below cannot change
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
        const auto* from = values.at(row);
        for (int i = 0; i < kVectors; ++i)
          products[corner] = multiply_add(load_wide<N>(from + i * N), grad_output[i], products[corner]);
      }
      if constexpr (kScatter) {
        const auto share = broadcast<Acc, N>(tile.coefficient[corner][point]);
        Acc* to = gradients.at(row);
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

template <int kUsed, bool kScatter, bool kDots, typename T, typename Values, typename Gradients>
void scatter_all(const BackwardWorker<T>& worker, const Values& values, const Gradients& gradients,
                 int64_t query) {
  constexpr int N = kLanes<Accumulator<T>>;
  const int64_t channels = worker.channels;
  int64_t at = 0;
  for (; at + 4 * N <= channels; at += 4 * N)
    scatter<4, kUsed, kScatter, kDots>(worker, values.from(at), gradients.from(at), query, at);
  for (; at + 2 * N <= channels; at += 2 * N)
    scatter<2, kUsed, kScatter, kDots>(worker, values.from(at), gradients.from(at), query, at);
  for (; at < channels; at += N)
    scatter<1, kUsed, kScatter, kDots>(worker, values.from(at), gradients.from(at), query, at);
}

// From the dots of each corner to the gradients of weight, eq. (6), and location (into tile.xy), eq. (7).
template <int kUsed, typename Acc>
void finish_points(Tile<Acc>& tile, const Acc* dots, Acc* grad_weight) {
  using Index = Integer<Acc>;
  constexpr int N = kLanes<Acc>;
  using Numbers = Vec<Acc, N>;
  Acc* const(&by_corner)[kCorners] = tile.coefficient;  // which have been used up
  split_columns(dots, tile.padded, by_corner);
  const Numbers zero = broadcast<Acc, N>(0), one = broadcast<Acc, N>(1);
  for (int64_t i = 0; i < tile.padded; i += N) {
    Numbers dot[kCorners];
    Vec<Index, N> touched = broadcast<Index, N>(0);
    for (int corner = 0; corner < kUsed; ++corner) {
      const auto inside = load<Index, N>(tile.row[corner] + i) >= broadcast<Index, N>(0);
      dot[corner] = select(inside, load<Acc, N>(by_corner[corner] + i), zero);
      touched = touched | inside;
    }
    if constexpr (kUsed == 1) {
      store(grad_weight + i, dot[0]);
      store(tile.x + i, zero);
      store(tile.y + i, zero);
    } else {
      const Numbers right = load<Acc, N>(tile.x + i), bottom = load<Acc, N>(tile.y + i);
      const Numbers left = one - right, top = one - bottom, weight = load<Acc, N>(tile.weight + i);
      const Numbers slope_x = top * (dot[1] - dot[0]) + bottom * (dot[3] - dot[2]);
      const Numbers slope_y = left * (dot[2] - dot[0]) + right * (dot[3] - dot[1]);
      store(tile.x + i, select(touched, weight * load<Acc, N>(tile.unit_x + i) * slope_x, zero));
      store(tile.y + i, select(touched, weight * load<Acc, N>(tile.unit_y + i) * slope_y, zero));
      store(grad_weight + i,
            top * (left * dot[0] + right * dot[1]) + bottom * (left * dot[2] + right * dot[3]));
    }
  }
  const Acc* __restrict x = tile.x;
  const Acc* __restrict y = tile.y;
  Acc* __restrict xy = tile.xy;
  for (int64_t i = 0; i < tile.padded; ++i) {
    xy[2 * i] = x[i];
    xy[2 * i + 1] = y[i];
  }
}

// Gradients of the tile to their places; those of weights to where finish_logits() takes them, if it does.
template <typename C, typename T>
void write_points_as(const BackwardWorker<T>& worker, const MsDeformAttnParams& p, int64_t row,
                     int64_t stride, int64_t queries) {
  using Acc = Accumulator<T>;
  const Tile<Acc>& tile = worker.tile;
  const Fusion<Acc>& fusion = worker.fusion;
  for (int64_t query = 0; query < queries; ++query) {
    const int64_t to = row + query * stride, from = query * tile.points;
    if (p.grad_locations)
      narrow_array(tile.xy + 2 * from, 2 * tile.points, static_cast<C*>(p.grad_locations) + 2 * to);
    if (p.grad_computed)
      narrow_array(fusion.grad_computed + 2 * from, 2 * tile.points,
                   static_cast<Acc*>(p.grad_computed) + 2 * to);
    if (fusion.grad_weights)
      narrow_array(worker.grad_weight + from, tile.points, fusion.grad_weights + to);
    else if (p.grad_weights)
      narrow_array(worker.grad_weight + from, tile.points, static_cast<C*>(p.grad_weights) + to);
  }
}

template <typename T>
void write_points(const BackwardWorker<T>& worker, const MsDeformAttnParams& p, int64_t row, int64_t stride,
                  int64_t queries) {
  with_coordinate<T>(
      p, [&](auto coordinate) { write_points_as<decltype(coordinate)>(worker, p, row, stride, queries); });
}

// The same places, brought into the cache; `size` is that of a coordinate, in bytes.
VITKERN_INLINE void prefetch_gradients(const MsDeformAttnParams& p, int64_t row, int64_t points,
                                       int64_t size) {
  if (p.grad_locations)
    prefetch_row_write(static_cast<char*>(p.grad_locations) + 2 * row * size, 2 * points * size);
  if (p.grad_weights) prefetch_row_write(static_cast<char*>(p.grad_weights) + row * size, points * size);
}

// Queries [begin, end) of one head, points of one group.
template <int kUsed, typename T, typename Values, typename Gradients>
void backward_queries(const MsDeformAttnParams& p, BackwardWorker<T>& worker, const Values& values,
                      const Gradients& gradients, const Group& group, int64_t image, int64_t head,
                      int64_t begin, int64_t end) {
  Tile<Accumulator<T>>& tile = worker.tile;
  const bool scatters = p.grad_value, dots = wants_points(p);
  const int64_t row_bytes = p.channels * sizeof(*values.base);
  const int64_t grad_bytes = p.channels * sizeof(Accumulator<T>), coordinate = coordinate_bytes<T>(p);
  for (int64_t first = begin; first < end; first += tile.queries) {
    const int64_t queries = end - first < tile.queries ? end - first : tile.queries;
    const int64_t row = (image * p.queries + first) * p.heads + head;
    const int64_t first_point = row * p.points + (group.count ? group.levels->first_point : 0);
    read_points<T>(tile, p, first_point, p.heads * p.points, queries);
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
      prefetch_points(p, first_point + (query + tile.queries) * p.heads * p.points, tile.points, coordinate);
      prefetch_row(grad_output + (query + tile.queries) * p.heads * p.channels, p.channels);
      if (dots) prefetch_gradients(p, first_point + query * p.heads * p.points, tile.points, coordinate);
      if (p.reference.points)
        prefetch_references<Accumulator<T>>(p.reference, image, first + tile.queries + query);
      if (far && query + kAhead < queries) {
        prefetch_rows<kUsed>(tile, query + kAhead, values, row_bytes);
        if (scatters) prefetch_rows<kUsed>(tile, query + kAhead, gradients, grad_bytes);
      }
      if (scatters && dots)
        scatter_all<kUsed, true, true>(worker, values, gradients, query);
      else if (scatters)
        scatter_all<kUsed, true, false>(worker, values, gradients, query);
      else
        scatter_all<kUsed, false, true>(worker, values, gradients, query);
    }
    if (!dots) continue;
    finish_points<kUsed>(tile, worker.dots, worker.grad_weight);
    if (p.reference.points) unfuse_points(worker.fusion, tile, p, queries, worker.grad_weight);
    write_points(worker, p, first_point, p.heads * p.points, queries);
  }
}

}  // namespace
}  // namespace vitkern::VITKERN_ISA
