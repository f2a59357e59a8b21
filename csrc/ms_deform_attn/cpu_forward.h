// SPDX-License-Identifier: Apache-2.0
// Forward: out[q] = sum over points and corners of coefficient * value row, eq. (1).
//
// Work split: a task is a stretch of queries of one head of one image; consecutive tasks, which run at the
// same time, share the head. Within a task, tiles of queries: first the coordinates of all points, then the
// rows they name.
// Memory: if rows are read several times, [S, M, D] is first copied to [M, S, D]: its stride of M
// * D numbers maps neighbours to the same cache sets. Rows are prefetched kAhead queries before they are
// added.
// Numerics: sums in the accumulator type, in an order that depends only on the shape.
#pragma once

#include <type_traits>

#include "common/parallel.h"
#include "ms_deform_attn/cpu_fused.h"

namespace vitkern::VITKERN_ISA {
namespace {

constexpr int64_t kAhead = 2;
constexpr int64_t kTaskQueries = 64;
constexpr int64_t kTaskPixels = 64;
// Points for each pixel, from which on a copy takes less time than it saves.
constexpr int64_t kWorthPacking = 8;

// Adds the corners of a query, kVectors vectors of channels. `rows` and `out` begin at the first of them.
template <int kVectors, int kUsed, typename AnyRows, typename Acc>
void gather(const AnyRows rows, const Tile<Acc>& tile, int64_t first, Acc* out) {
  constexpr int N = kLanes<Acc>;
  constexpr int kSums = kVectors >= 8   ? 1
                        : kVectors >= 4 ? 2
                                        : kUsed;  // as many as hide the latency of an addition
  // Sums of channels in their order, or of those at even and odd places in turn.
  constexpr bool kPairs = std::is_same<decltype(rows.base), const BFloat16*>::value && kVectors % 2 == 0;
  Vec<Acc, N> sums[kSums][kVectors] = {};
  for (int64_t point = first; point < first + tile.points; ++point)
    for (int corner = 0; corner < kUsed; ++corner) {
      const auto coefficient = broadcast<Acc, N>(tile.coefficient[corner][point]);
      const auto* row = rows.at(tile.row[corner][point]);
      Vec<Acc, N>* const into = sums[corner % kSums];
      if constexpr (kPairs)
        for (int i = 0; i < kVectors; i += 2) {
          Vec<Acc, N> even, odd;
          load_pairs(row + i * N, even, odd);
          into[i] = multiply_add(even, coefficient, into[i]);
          into[i + 1] = multiply_add(odd, coefficient, into[i + 1]);
        }
      else
        for (int i = 0; i < kVectors; ++i)
          into[i] = multiply_add(load_wide<N>(row + i * N), coefficient, into[i]);
    }
  for (int i = 0; i < kVectors; ++i)
    for (int s = 1; s < kSums; ++s) sums[0][i] = sums[0][i] + sums[s][i];
  if constexpr (kPairs)
    for (int i = 0; i < kVectors; i += 2) store_pairs(out + i * N, sums[0][i], sums[0][i + 1]);
  else
    for (int i = 0; i < kVectors; ++i) store(out + i * N, sums[0][i]);
}

template <int kUsed, typename AnyRows, typename Acc>
void gather_all(const AnyRows& rows, const Tile<Acc>& tile, int64_t first, int64_t channels, Acc* out) {
  constexpr int N = kLanes<Acc>;
  int64_t at = 0;
  for (; at + 8 * N <= channels; at += 8 * N) gather<8, kUsed>(rows.from(at), tile, first, out + at);
  for (; at + 4 * N <= channels; at += 4 * N) gather<4, kUsed>(rows.from(at), tile, first, out + at);
  for (; at + 2 * N <= channels; at += 2 * N) gather<2, kUsed>(rows.from(at), tile, first, out + at);
  for (; at < channels; at += N) gather<1, kUsed>(rows.from(at), tile, first, out + at);
}

// The memory of one worker.
template <typename T>
struct ForwardWorker {
  using Acc = Accumulator<T>;
  Tile<Acc> tile;
  Fusion<Acc> fusion;
  Acc* sums;

  void lay_out(Cursor& cursor, const MsDeformAttnParams& p) {
    tile.lay_out(cursor, p.points);
    fusion.lay_out(cursor, p);
    sums = cursor.take<Acc>(whole_vectors<Acc>(p.channels));
  }
};

// Queries [begin, end) of one head. kUsed = corners of a point: 4, or 1 for the nearest pixel.
template <int kUsed, typename T, typename AnyRows>
void forward_queries(const MsDeformAttnParams& p, ForwardWorker<T>& worker, const AnyRows& rows,
                     int64_t image, int64_t head, int64_t begin, int64_t end) {
  using Acc = Accumulator<T>;
  Tile<Acc>& tile = worker.tile;
  const int64_t channels = whole_vectors<Acc>(p.channels), row_bytes = p.channels * sizeof(*rows.base);
  const int64_t coordinate = coordinate_bytes<T>(p);
  for (int64_t first = begin; first < end; first += tile.queries) {
    const int64_t queries = end - first < tile.queries ? end - first : tile.queries;
    const int64_t row = (image * p.queries + first) * p.heads + head;
    read_points<T>(tile, p, row * p.points, p.heads * p.points, queries);
    if (p.reference.points) fuse_points(worker.fusion, tile, p, image, head, first, queries);
    if constexpr (kUsed == kCorners)
      locate_bilinear(tile);
    else
      locate_nearest(tile);

    T* out = static_cast<T*>(p.output) + row * p.channels;
    const bool far = scattered(tile, queries);
    for (int64_t query = 0; query < queries; ++query) {
      prefetch_points(p, (row + (query + tile.queries) * p.heads) * p.points, p.points, coordinate);
      if (p.reference.points) prefetch_references<Acc>(p.reference, image, first + tile.queries + query);
      prefetch_row_write(out + (query + kAhead) * p.heads * p.channels, p.channels);
      if (far && query + kAhead < queries) prefetch_rows<kUsed>(tile, query + kAhead, rows, row_bytes);
      T* const row_out = out + query * p.heads * p.channels;
      if constexpr (std::is_same<T, Acc>::value) {
        if (channels == p.channels) {
          gather_all<kUsed>(rows, tile, query * tile.points, channels, row_out);
          continue;
        }
      }
      gather_all<kUsed>(rows, tile, query * tile.points, channels, worker.sums);
      narrow_array(worker.sums, p.channels, row_out);
    }
  }
}

// Copies pixels [begin, end) of an image to [M, 1 + S, channels], behind the row of corners outside; widened, channels
// padded with zeros.
template <typename T>
void pack(const MsDeformAttnParams& p, int64_t image, int64_t begin, int64_t end, int64_t channels,
          Accumulator<T>* packed) {
  const T* value = static_cast<const T*>(p.value) + (image * p.pixels + begin) * p.heads * p.channels;
  for (int64_t pixel = begin; pixel < end; ++pixel)
    for (int64_t head = 0; head < p.heads; ++head, value += p.channels) {
      Accumulator<T>* row = packed + (head * (p.pixels + 1) + 1 + pixel) * channels;
      widen_array(value, p.channels, row);
      for (int64_t channel = p.channels; channel < channels; ++channel) row[channel] = 0;
    }
}

template <int kUsed, typename T>
void forward(const MsDeformAttnParams& p, const Level* levels) {
  using Acc = Accumulator<T>;
  const int64_t channels = whole_vectors<Acc>(p.channels);
  const bool packs = channels != p.channels || p.queries * p.points >= kWorthPacking * p.pixels;
  const int64_t stretches = divide_up(p.queries, kTaskQueries);
  const int64_t images_at_once = packs ? 1 : p.batch;
  const int64_t tasks = images_at_once * p.heads * stretches;
  const int workers = worker_count(tasks, p.threads);

  ForwardWorker<T>* worker;
  Acc *packed, *outside;
  const Arena arena([&](Cursor& cursor) {
    worker = take_each<ForwardWorker<T>>(cursor, workers,
                                         [&](ForwardWorker<T>& each) { each.lay_out(cursor, p); });
    outside = cursor.take<Acc>(channels);
    packed = cursor.take<Acc>(packs ? p.heads * (p.pixels + 1) * channels : 0);
  });
  memset(outside, 0, channels * sizeof(Acc));
  for (int64_t head = 0; packs && head < p.heads; ++head)
    memset(packed + head * (p.pixels + 1) * channels, 0, channels * sizeof(Acc));
  for (int i = 0; i < workers; ++i) {
    set_levels(worker[i].tile, levels, p.levels, 0);
    if (p.reference.points) set_fusion(worker[i].fusion, worker[i].tile, levels, p.levels);
  }

  prefer_huge_pages(p.output, p.batch * p.queries * p.heads * p.channels * sizeof(T));
  for (int64_t first_image = 0; first_image < p.batch; first_image += images_at_once) {
    if (packs)
      parallel_for(divide_up(p.pixels, kTaskPixels), p.threads, [&](int64_t task, int) {
        const int64_t begin = task * kTaskPixels, rest = p.pixels - begin;
        pack<T>(p, first_image, begin, begin + (rest < kTaskPixels ? rest : kTaskPixels), channels, packed);
      });
    parallel_for(tasks, p.threads, [&](int64_t task, int who) {
      const int64_t begin = task % stretches * kTaskQueries, rest = p.queries - begin;
      const int64_t head = task / stretches % p.heads, image = first_image + task / stretches / p.heads;
      const int64_t end = begin + (rest < kTaskQueries ? rest : kTaskQueries);
      if (packs) {
        const PackedRows<const Acc> rows = {packed + (head * (p.pixels + 1) + 1) * channels, channels};
        forward_queries<kUsed, T>(p, worker[who], rows, image, head, begin, end);
      } else {
        const T* value = static_cast<const T*>(p.value) + (image * p.pixels * p.heads + head) * p.channels;
        const Rows<const T> rows = {value, p.heads * p.channels, reinterpret_cast<const T*>(outside)};
        forward_queries<kUsed, T>(p, worker[who], rows, image, head, begin, end);
      }
    });
  }
}

}  // namespace
}  // namespace vitkern::VITKERN_ISA
