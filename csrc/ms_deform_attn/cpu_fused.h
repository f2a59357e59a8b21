// SPDX-License-Identifier: Apache-2.0
// The fused form: softmax of logits, eq. (8), and pixel coordinates from reference points and offsets, eqs.
// (9) and (10), computed within a tile, so that weights and locations are never in memory. Backward: turns the
// gradients of the tile into those of offsets and locations, eq. (12), and of logits, eq. (11).
//
// The softmax runs over all levels. A backward task that sees all of them does so too; for tasks of one
// level there are the passes of cpu_logits.h.
#pragma once

#include <math.h>

#include "common/exp.h"
#include "common/prefetch.h"
#include "ms_deform_attn/cpu_points.h"

namespace vitkern::VITKERN_ISA {
namespace {

// Turns logits into weights: w = exp(z - largest) * scale.
template <typename Acc>
struct Softmax {
  Acc largest, scale;
};

// The memory of one worker beside its tile. Arrays are over the points of the tile if not said otherwise.
template <typename Acc>
struct Fusion {
  Acc* one;                        // the unit of x and y: offsets come out in pixels
  Acc *reference_x, *reference_y;  // reference point of each point
  Acc *reach_x, *reach_y;          // how many pixels an offset of 1 goes
  Acc *spread_x, *spread_y;        // the reach in a box of size 1: the level's size over 2 P
  Acc *largest, *scale;            // of each point's query
  Acc* grad_computed;              // [points, 2] gradients of the computed locations
  Softmax<Acc>* softmax;           // [queries]
  const Level* levels;             // the levels of the tile's points
  int64_t level_count;
  const Softmax<Acc>* known;  // [B, M, Q], or null: every tile holds all points of its queries
  Acc* grad_weights;          // [B, Q, M, K] gradients of the weights

  void lay_out(Cursor& cursor, const MsDeformAttnParams& p) {
    const int64_t most = p.points < kTilePoints ? kTilePoints : p.points;
    const int64_t size = p.reference.points ? most + kLanes<Acc> : 0;
    Acc** const arrays[] = {&one,      &reference_x, &reference_y, &reach_x, &reach_y,
                            &spread_x, &spread_y,    &largest,     &scale};
    for (Acc** array : arrays) *array = cursor.take<Acc>(size);
    grad_computed = cursor.take<Acc>(2 * size);
    softmax = cursor.take<Softmax<Acc>>(p.reference.points ? kTileQueries : 0);
    known = nullptr;
    grad_weights = nullptr;
  }
};

// Sets a worker to the points of these levels, as set_levels() does, which must have come before.
template <typename Acc>
void set_fusion(Fusion<Acc>& fusion, Tile<Acc>& tile, const Level* levels, int64_t level_count) {
  fusion.levels = levels;
  fusion.level_count = level_count;
  for (int64_t i = 0; i < tile.padded; ++i) {
    fusion.one[i] = fusion.reach_x[i] = fusion.reach_y[i] = 1;
    fusion.reference_x[i] = fusion.reference_y[i] = fusion.spread_x[i] = fusion.spread_y[i] = 0;
  }
  for (int64_t query = 0; query < tile.queries; ++query)
    for (const Level* level = levels; level < levels + level_count; ++level)
      for (int64_t point = level->first_point; point < level->last_point; ++point) {
        const int64_t i = query * tile.points + point - levels->first_point;
        const Acc halves = static_cast<Acc>(2 * (level->last_point - level->first_point));
        fusion.spread_x[i] = static_cast<Acc>(level->width) / halves;
        fusion.spread_y[i] = static_cast<Acc>(level->height) / halves;
      }
  tile.unit_x = tile.unit_y = fusion.one;
}

// `count` times the same number. Whole vectors: what follows must be written later, or be padding.
template <typename Acc>
VITKERN_INLINE void repeat(Acc x, int64_t count, Acc* to) {
  constexpr int N = kLanes<Acc>;
  for (int64_t i = 0; i < count; i += N) store(to + i, broadcast<Acc, N>(x));
}

// Brings the reference points of each point of the tile into anchor and reach, the latter for boxes only.
template <typename Acc>
void read_references(const Fusion<Acc>& fusion, const Tile<Acc>& tile, const Reference& reference,
                     int64_t image, int64_t first, int64_t queries) {
  const Acc* const points = static_cast<const Acc*>(reference.points) + image * reference.batch_stride;
  const bool shared = reference.level_stride == 0;
  for (int64_t query = 0, to = 0; query < queries; ++query)
    for (int64_t i = 0; i < (shared ? 1 : fusion.level_count); ++i) {
      const Level& level = fusion.levels[i];
      const int64_t count = shared ? tile.points : level.last_point - level.first_point;
      const Acc* at =
          points + (first + query) * reference.query_stride + level.index * reference.level_stride;
      repeat(at[0], count, fusion.reference_x + to);
      repeat(at[1], count, fusion.reference_y + to);
      if (reference.numbers == 4) {
        repeat(at[2], count, fusion.reach_x + to);
        repeat(at[3], count, fusion.reach_y + to);
      }
      to += count;
    }
}

// Brings what a later read_references() reads into the cache: a query's points of all levels mostly share a line.
template <typename Acc>
VITKERN_INLINE void prefetch_references(const Reference& reference, int64_t image, int64_t query) {
  const Acc* const points = static_cast<const Acc*>(reference.points) + image * reference.batch_stride;
  prefetch(points + query * reference.query_stride);
}

// From offsets to pixels, eqs. (9) and (10), in tile.x and tile.y.
template <typename Acc>
void place_points(const Fusion<Acc>& fusion, const Tile<Acc>& tile, const MsDeformAttnParams& p,
                  int64_t image, int64_t first, int64_t queries) {
  constexpr int N = kLanes<Acc>;
  const int64_t padded = tile.padded;  // a copy, which the stores below cannot change
  read_references(fusion, tile, p.reference, image, first, queries);
  const auto scale = [&](Acc* reach, const Acc* spread) {
    for (int64_t i = 0; i < padded; i += N)
      store(reach + i, load<Acc, N>(reach + i) * load<Acc, N>(spread + i));
  };
  const bool boxes = p.reference.numbers == 4;
  if (boxes) {
    scale(fusion.reach_x, fusion.spread_x);
    scale(fusion.reach_y, fusion.spread_y);
  }
  const auto place = [&](Acc* offset, const Acc* reach, const Acc* anchor, const Acc* size) {
    for (int64_t i = 0; i < padded; i += N) {
      const auto origin = rounded(load<Acc, N>(anchor + i) * load<Acc, N>(size + i));
      auto way = load<Acc, N>(offset + i);
      if (boxes) way = rounded(way * load<Acc, N>(reach + i));
      store(offset + i, way + origin);
    }
  };
  place(tile.x, fusion.reach_x, fusion.reference_x, tile.width);
  place(tile.y, fusion.reach_y, fusion.reference_y, tile.height);
}

// The largest of a row of logits, which has a vector's room behind it.
template <typename Acc>
VITKERN_INLINE Acc largest_of(const Acc* logits, int64_t count) {
  constexpr int N = kLanes<Acc>;
  const auto lowest = broadcast<Acc, N>(-static_cast<Acc>(HUGE_VAL));
  auto high = lowest;
  for (int64_t i = 0; i < count; i += N)
    high = maximum(select(first_lanes<Acc, N>(count - i), load<Acc, N>(logits + i), lowest), high);
  return largest_lane(high);
}

// The sum of power(i), vectors of numbers, over the `count` numbers of a row.
template <typename Acc, typename Power>
VITKERN_INLINE Acc sum_of(int64_t count, const Power& power) {
  constexpr int N = kLanes<Acc>;
  const auto zero = broadcast<Acc, N>(0);
  auto total = zero;
  for (int64_t i = 0; i < count; i += N)
    total = total + select(first_lanes<Acc, N>(count - i), power(i), zero);
  return sum(total);
}

// From the logits of `rows` rows to their weights, in place, eq. (8).
template <typename Acc>
void weigh_rows(const Fusion<Acc>& fusion, const Softmax<Acc>* softmax, int64_t rows, int64_t points,
                Acc* weights) {
  constexpr int N = kLanes<Acc>;
  for (int64_t row = 0; row < rows; ++row) {
    repeat(softmax[row].largest, points, fusion.largest + row * points);
    repeat(softmax[row].scale, points, fusion.scale + row * points);
  }
  for (int64_t i = 0; i < rows * points; i += N) {
    const auto power = exp_nonpositive(load<Acc, N>(weights + i) - load<Acc, N>(fusion.largest + i));
    store(weights + i, power * load<Acc, N>(fusion.scale + i));
  }
}

// The same if only the logits are known. Each pass goes over all rows: the largest and the total of a row depend on
// earlier results of that row, but not on other rows.
template <typename Acc>
void softmax_rows(const Fusion<Acc>& fusion, int64_t rows, int64_t points, Acc* weights) {
  constexpr int N = kLanes<Acc>;
  for (int64_t row = 0; row < rows; ++row)
    repeat(largest_of(weights + row * points, points), points, fusion.largest + row * points);
  for (int64_t i = 0; i < rows * points; i += N)
    store(weights + i, exp_nonpositive(load<Acc, N>(weights + i) - load<Acc, N>(fusion.largest + i)));
  for (int64_t row = 0; row < rows; ++row) {
    const Acc* const powers = weights + row * points;
    const Acc total =
        sum_of<Acc>(points, [&](int64_t i) VITKERN_INLINE_LAMBDA { return load<Acc, N>(powers + i); });
    repeat(1 / total, points, fusion.scale + row * points);
  }
  for (int64_t i = 0; i < rows * points; i += N)
    store(weights + i, load<Acc, N>(weights + i) * load<Acc, N>(fusion.scale + i));
}

// Makes weights and pixels of the logits and offsets that read_points() has brought.
template <typename Acc>
void fuse_points(const Fusion<Acc>& fusion, const Tile<Acc>& tile, const MsDeformAttnParams& p, int64_t image,
                 int64_t head, int64_t first, int64_t queries) {
  place_points(fusion, tile, p, image, first, queries);
  if (fusion.known) {
    const Softmax<Acc>* known = fusion.known + (image * p.heads + head) * p.queries + first;
    return weigh_rows(fusion, known, queries, tile.points, tile.weight);
  }
  softmax_rows(fusion, queries, tile.points, tile.weight);
}

// From gradients by weights to those by logits, in place, eq. (11).
template <typename Acc>
void unweigh_rows(const Fusion<Acc>& fusion, const Acc* weights, int64_t rows, int64_t points, Acc* grads) {
  constexpr int N = kLanes<Acc>;
  for (int64_t row = 0; row < rows; ++row) {
    auto products = broadcast<Acc, N>(0);
    for (int64_t i = 0, at = row * points; i < points; i += N, at += N)
      products =
          products + select(first_lanes<Acc, N>(points - i),
                            load<Acc, N>(weights + at) * load<Acc, N>(grads + at), broadcast<Acc, N>(0));
    repeat(sum(products), points, fusion.scale + row * points);
  }
  for (int64_t i = 0; i < rows * points; i += N)
    store(grads + i, load<Acc, N>(weights + i) * (load<Acc, N>(grads + i) - load<Acc, N>(fusion.scale + i)));
}

// Turns the gradients by pixels in tile.xy into those of offsets, in place, and of locations, eq. (12), and those of the
// weights into those of logits.
template <typename Acc>
void unfuse_points(const Fusion<Acc>& fusion, const Tile<Acc>& tile, const MsDeformAttnParams& p,
                   int64_t queries, Acc* grad_weight) {
  // A box that is not finite leaves its points without a gradient: 0, and not 0 times infinity.
  const auto product = [](Acc gradient, Acc size) { return gradient == 0 ? gradient : gradient * size; };
  const auto multiply = [&](const Acc* from, const Acc* x, const Acc* y, Acc* to) {
    for (int64_t i = 0; i < queries * tile.points; ++i) {
      to[2 * i] = product(from[2 * i], x[i]);
      to[2 * i + 1] = product(from[2 * i + 1], y[i]);
    }
  };
  if (p.grad_computed) multiply(tile.xy, tile.width, tile.height, fusion.grad_computed);
  if (p.grad_locations && p.reference.numbers == 4)
    multiply(tile.xy, fusion.reach_x, fusion.reach_y, tile.xy);
  if (p.grad_weights && !fusion.known) unweigh_rows(fusion, tile.weight, queries, tile.points, grad_weight);
}

}  // namespace
}  // namespace vitkern::VITKERN_ISA
