// SPDX-License-Identifier: Apache-2.0
// A tile: the sampling points of a few queries of one head, side by side, so that the maths of coordinates
// runs over whole vectors whatever the number of points a query has. Forward and backward begin here.
#pragma once

#include "common/elements.h"
#include "common/scratch.h"
#include "common/sizes.h"
#include "ms_deform_attn/params.h"

namespace vitkern::VITKERN_ISA {
namespace {

constexpr int kCorners = 4;           // top left, top right, bottom left, bottom right
constexpr int kOutside = -1;          // the row of a corner that is not in its level
constexpr int64_t kTilePoints = 256;  // a tile's arrays stay in the L1 cache
constexpr int64_t kTileQueries = 64;

struct Level {
  int64_t index;  // among the levels of the call
  int64_t height, width, start;
  int64_t first_point, last_point;

  int64_t pixels() const { return height * width; }
};

// Arrays over the points of a tile, [queries, points] flat and padded to whole vectors.
template <typename Acc>
struct Tile {
  using Index = Integer<Acc>;

  int64_t points;   // of one query
  int64_t queries;  // at most
  int64_t padded;   // queries * points, up to whole vectors

  // Size and first row of each point's level.
  Acc *width, *height;
  Index *columns, *rows, *start;

  // Pixels that a location of 1 stands for: the level's size; in the fused form, one pixel.
  const Acc *unit_x, *unit_y;

  // Locations and weight of each point. x and y become the shares of the right and bottom corners.
  Acc *xy, *x, *y, *weight;

  // Row of each corner or kOutside, and its bilinear coefficient times the weight (0 outside).
  Index* row[kCorners];
  Acc* coefficient[kCorners];

  // Room for queries of up to `most` points each.
  void lay_out(Cursor& cursor, int64_t most) {
    const int64_t size = (most < kTilePoints ? kTilePoints : most) + kLanes<Acc>;
    width = cursor.take<Acc>(size);
    height = cursor.take<Acc>(size);
    unit_x = width;
    unit_y = height;
    columns = cursor.take<Index>(size);
    rows = cursor.take<Index>(size);
    start = cursor.take<Index>(size);
    xy = cursor.take<Acc>(2 * size);
    x = cursor.take<Acc>(size);
    y = cursor.take<Acc>(size);
    weight = cursor.take<Acc>(size);
    for (int corner = 0; corner < kCorners; ++corner) {
      row[corner] = cursor.take<Index>(size);
      coefficient[corner] = cursor.take<Acc>(size);
    }
  }
};

// Cuts the tile for queries with the points of these levels. `first_row` is the pixel that row 0 stands for.
// Padding lanes belong to a level without pixels.
template <typename Acc>
void set_levels(Tile<Acc>& tile, const Level* levels, int64_t level_count, int64_t first_row) {
  using Index = Integer<Acc>;
  const int64_t first_point = level_count ? levels[0].first_point : 0;
  tile.points = level_count ? levels[level_count - 1].last_point - first_point : 0;
  tile.queries = tile.points ? kTilePoints / tile.points : kTileQueries;
  tile.queries = tile.queries < 1 ? 1 : tile.queries > kTileQueries ? kTileQueries : tile.queries;
  tile.padded = whole_vectors<Acc>(tile.queries * tile.points);
  for (int64_t i = 0; i < tile.padded; ++i) {
    tile.width[i] = tile.height[i] = 0;
    tile.columns[i] = tile.rows[i] = tile.start[i] = 0;
    tile.xy[2 * i] = tile.xy[2 * i + 1] = tile.weight[i] = 0;
  }
  for (int64_t query = 0; query < tile.queries; ++query)
    for (const Level* level = levels; level < levels + level_count; ++level)
      for (int64_t point = level->first_point; point < level->last_point; ++point) {
        const int64_t i = query * tile.points + point - first_point;
        tile.width[i] = static_cast<Acc>(level->width);
        tile.height[i] = static_cast<Acc>(level->height);
        tile.columns[i] = static_cast<Index>(level->width);
        tile.rows[i] = static_cast<Index>(level->height);
        tile.start[i] = static_cast<Index>(level->start - first_row);
      }
}

// Calls body(C{}) with the type of locations, weights and their gradients, where value is of type T: T or its
// accumulator. Only what reads and writes them is compiled for both.
template <typename T, typename Body>
VITKERN_INLINE void with_coordinate(const MsDeformAttnParams& p, const Body& body) {
  if constexpr (sizeof(T) == 2)
    if (p.coord_dtype == p.value_dtype) return body(T{});
  body(Accumulator<T>{});
}

template <typename T>
VITKERN_INLINE int64_t coordinate_bytes(const MsDeformAttnParams& p) {
  return p.coord_dtype == p.value_dtype ? sizeof(T) : sizeof(Accumulator<T>);
}

// Reads `queries` queries; `row` is the index of the first one's points in [B, Q, M, K], `stride` from query
// to query.
template <typename T, typename Acc>
void read_points(Tile<Acc>& tile, const MsDeformAttnParams& p, int64_t row, int64_t stride, int64_t queries) {
  with_coordinate<T>(p, [&](auto coordinate) {
    using C = decltype(coordinate);
    const C* locations = static_cast<const C*>(p.locations) + 2 * row;
    const C* weights = static_cast<const C*>(p.weights) + row;
    for (int64_t query = 0; query < queries; ++query) {
      widen_array(locations + 2 * query * stride, 2 * tile.points, tile.xy + 2 * query * tile.points);
      widen_array(weights + query * stride, tile.points, tile.weight + query * tile.points);
    }
  });
  const Acc* __restrict xy = tile.xy;
  Acc* __restrict x = tile.x;
  Acc* __restrict y = tile.y;
  for (int64_t i = 0; i < tile.padded; ++i) {
    x[i] = xy[2 * i];
    y[i] = xy[2 * i + 1];
  }
}

// Rows and coefficients of the four corners, eqs. (2) and (3). Products are rounded before 1/2 is subtracted,
// so that all instruction sets put a location on the edge of a cell into the same cell.
template <typename Acc>
void locate_bilinear(Tile<Acc>& tile) {
  using Index = Integer<Acc>;
  constexpr int N = kLanes<Acc>;
  using Numbers = Vec<Acc, N>;
  using Indices = Vec<Index, N>;
  const Numbers zero = broadcast<Acc, N>(0), half = broadcast<Acc, N>(Acc(0.5)), one = broadcast<Acc, N>(1);
  const Indices first = broadcast<Index, N>(0), next = broadcast<Index, N>(1),
                outside = broadcast<Index, N>(kOutside);
  for (int64_t i = 0; i < tile.padded; i += N) {
    const Numbers width = load<Acc, N>(tile.width + i), height = load<Acc, N>(tile.height + i);
    Numbers x = rounded(load<Acc, N>(tile.x + i) * load<Acc, N>(tile.unit_x + i)) - half;
    Numbers y = rounded(load<Acc, N>(tile.y + i) * load<Acc, N>(tile.unit_y + i)) - half;
    // Every comparison with NaN is false: a location that is not a number touches no pixel.
    const Indices near = (x > zero - one) & (x < width) & (y > zero - one) & (y < height);
    x = select(near, x, zero);
    y = select(near, y, zero);
    const Numbers left = floor(x), top = floor(y);
    const Numbers right_share = x - left, bottom_share = y - top;
    store(tile.x + i, right_share);
    store(tile.y + i, bottom_share);

    const Indices columns = load<Index, N>(tile.columns + i), rows = load<Index, N>(tile.rows + i);
    const Indices column = convert<Index>(left), row = convert<Index>(top);
    const Indices at_left = (column >= first) & (column < columns) & near;
    const Indices at_right = (column + next < columns) & near;
    const Indices at_top = (row >= first) & (row < rows), at_bottom = row + next < rows;
    const Indices inside[kCorners] = {at_left & at_top, at_right & at_top, at_left & at_bottom,
                                      at_right & at_bottom};
    const Indices top_left = load<Index, N>(tile.start + i) + row * columns + column;
    const Indices pixel[kCorners] = {top_left, top_left + next, top_left + columns,
                                     top_left + columns + next};
    const Numbers weight = load<Acc, N>(tile.weight + i);
    const Numbers share[kCorners] = {(one - right_share) * (one - bottom_share),
                                     right_share * (one - bottom_share), (one - right_share) * bottom_share,
                                     right_share * bottom_share};
    for (int corner = 0; corner < kCorners; ++corner) {
      store(tile.row[corner] + i, select(inside[corner], pixel[corner], outside));
      store(tile.coefficient[corner] + i, select(inside[corner], weight * share[corner], zero));
    }
  }
}

// One corner with coefficient 1: the pixel under the location, clamped to the level, eq. (4).
template <typename Acc>
void locate_nearest(Tile<Acc>& tile) {
  using Index = Integer<Acc>;
  constexpr int N = kLanes<Acc>;
  using Numbers = Vec<Acc, N>;
  using Indices = Vec<Index, N>;
  const Numbers zero = broadcast<Acc, N>(0), half = broadcast<Acc, N>(Acc(0.5)), one = broadcast<Acc, N>(1);
  const Indices next = broadcast<Index, N>(1);
  for (int64_t i = 0; i < tile.padded; i += N) {
    const Numbers width = load<Acc, N>(tile.width + i), height = load<Acc, N>(tile.height + i);
    Numbers x = rounded(load<Acc, N>(tile.x + i) * load<Acc, N>(tile.unit_x + i)) + half;
    Numbers y = rounded(load<Acc, N>(tile.y + i) * load<Acc, N>(tile.unit_y + i)) + half;
    // x - x is 0 for finite x, NaN for the others. A level without pixels has none to read.
    const Indices finite = (x - x == zero) & (y - y == zero) & (width > zero) & (height > zero);
    x = select(finite & (x > zero), x, zero);
    y = select(finite & (y > zero), y, zero);
    x = select(x < width - one, x, width - one);
    y = select(y < height - one, y, height - one);
    // The bounds above are rounded where a size has more digits than Acc.
    const Indices columns = load<Index, N>(tile.columns + i), rows = load<Index, N>(tile.rows + i);
    Indices column = convert<Index>(x), row = convert<Index>(y);
    column = select(column < columns, column, columns - next);
    row = select(row < rows, row, rows - next);
    const Indices pixel = load<Index, N>(tile.start + i) + row * columns + column;
    store(tile.row[0] + i, select(finite, pixel, broadcast<Index, N>(kOutside)));
    store(tile.coefficient[0] + i, select(finite, load<Acc, N>(tile.weight + i), zero));
  }
}

// Where the rows of one head lie within [S, M, D]. Corners outside are sent to `outside`.
template <typename T>
struct Rows {
  T* base;
  int64_t stride;
  T* outside;

  VITKERN_INLINE T* at(int64_t row) const {
    T* const inside = base + row * stride;
    return row < 0 ? outside : inside;
  }
  Rows from(int64_t channel) const { return {base + channel, stride, outside + channel}; }
};

// Rows side by side, the row of corners outside before the first: kOutside then is a row like any other.
template <typename T>
struct PackedRows {
  T* base;
  int64_t stride;

  VITKERN_INLINE T* at(int64_t row) const { return base + row * stride; }
  PackedRows from(int64_t channel) const { return {base + channel, stride}; }
};

// Brings the rows of a query into the cache.
template <int kUsed, typename AnyRows, typename Acc>
VITKERN_INLINE void prefetch_rows(const Tile<Acc>& tile, int64_t query, const AnyRows& rows, int64_t bytes) {
  for (int corner = 0; corner < kUsed; ++corner) {
    const Integer<Acc>* row = tile.row[corner] + query * tile.points;
    for (int64_t point = 0; point < tile.points; ++point)
      for (int64_t byte = 0; byte < bytes; byte += 64)
        prefetch(reinterpret_cast<const char*>(rows.at(row[point])) + byte);
  }
}

// Whether consecutive queries read distant rows. If not, the caches already hold the rows that prefetching would bring.
template <typename Acc>
bool scattered(const Tile<Acc>& tile, int64_t queries) {
  constexpr int kNearby = 16;  // rows
  const Integer<Acc>*row = tile.row[0], *following = tile.row[0] + tile.points;
  int32_t far = 0;
  for (int64_t i = 0; i < (queries - 1) * tile.points; ++i)
    far += following[i] - row[i] > kNearby || row[i] - following[i] > kNearby;
  return queries == 1 || 4 * far > (queries - 1) * tile.points;
}

// Prefetches the points for a later read_points(), because the points of consecutive queries lie far apart. `size` is that
// of a coordinate, in bytes.
VITKERN_INLINE void prefetch_points(const MsDeformAttnParams& p, int64_t row, int64_t points, int64_t size) {
  const char* locations = static_cast<const char*>(p.locations) + 2 * row * size;
  const char* weights = static_cast<const char*>(p.weights) + row * size;
  for (int64_t byte = 0; byte < 2 * points * size; byte += 64) prefetch(locations + byte);
  for (int64_t byte = 0; byte < points * size; byte += 64) prefetch(weights + byte);
}

}  // namespace
}  // namespace vitkern::VITKERN_ISA
