// SPDX-License-Identifier: Apache-2.0
// The softmax of the fused form where a backward task sees one level, and so a part of each row of logits: a pass over
// all logits before the tasks leaves two numbers of each query and head, eq. (8), and a pass over the gradients of the
// weights after them turns these into those of the logits, eq. (11).
#pragma once

#include "common/parallel.h"
#include "ms_deform_attn/cpu_fused.h"

namespace vitkern::VITKERN_ISA {
namespace {

constexpr int64_t kRowsOfTask = 512;  // of logits, one row for each query and head

// The softmax of a row of logits. A NaN makes the scale NaN, as do infinities that have no softmax.
template <typename Acc>
Softmax<Acc> softmax_of(const Acc* logits, int64_t count) {
  constexpr int N = kLanes<Acc>;
  const Acc top = largest_of(logits, count);
  const Acc total = sum_of<Acc>(count, [&](int64_t i) VITKERN_INLINE_LAMBDA {
    return exp_nonpositive(load<Acc, N>(logits + i) - broadcast<Acc, N>(top));
  });
  return {top, 1 / total};
}

// Where the softmax of a row of logits, one of [B, Q, M], lies in [B, M, Q].
inline int64_t softmax_index(const MsDeformAttnParams& p, int64_t row) {
  const int64_t head = row % p.heads, query = row / p.heads % p.queries, image = row / p.heads / p.queries;
  return (image * p.heads + head) * p.queries + query;
}

// Calls body(worker, first, count) for all rows of logits of the call, as many at once as a tile holds.
template <typename Body>
void for_rows(const MsDeformAttnParams& p, int workers, const Body& body) {
  if (p.points == 0) return;
  const int64_t rows = p.batch * p.queries * p.heads;
  const int64_t fitting = p.points < kTilePoints ? kTilePoints / p.points : 1;
  const int64_t step = fitting < kTileQueries ? fitting : kTileQueries;
  parallel_for(divide_up(rows, kRowsOfTask), workers, [&](int64_t task, int who) {
    const int64_t end = rows < (task + 1) * kRowsOfTask ? rows : (task + 1) * kRowsOfTask;
    for (int64_t row = task * kRowsOfTask; row < end; row += step)
      body(who, row, end - row < step ? end - row : step);
  });
}

template <typename T, typename Acc>
void read_logits(const MsDeformAttnParams& p, int64_t first, int64_t count, Acc* to) {
  with_coordinate<T>(p, [&](auto coordinate) {
    widen_array(static_cast<const decltype(coordinate)*>(p.weights) + first, count, to);
  });
}

// The pass before: what makes weights of the logits, for every query and head.
template <typename T, typename Worker, typename Acc>
void measure_logits(const MsDeformAttnParams& p, Worker* workers, int count, Softmax<Acc>* known) {
  for_rows(p, count, [&](int who, int64_t first, int64_t rows) {
    Acc* const logits = workers[who].tile.weight;
    read_logits<T>(p, first * p.points, rows * p.points, logits);
    for (int64_t row = 0; row < rows; ++row)
      known[softmax_index(p, first + row)] = softmax_of(logits + row * p.points, p.points);
  });
}

// The pass after: from gradients of weights to those of logits; both may be the same array.
template <typename T, typename Worker, typename Acc>
void finish_logits(const MsDeformAttnParams& p, Worker* workers, int count, const Softmax<Acc>* known) {
  for_rows(p, count, [&](int who, int64_t first, int64_t rows) {
    const Fusion<Acc>& fusion = workers[who].fusion;
    Acc *const weights = workers[who].tile.weight, *const grads = workers[who].tile.x;
    const int64_t points = rows * p.points;
    read_logits<T>(p, first * p.points, points, weights);
    widen_array(fusion.grad_weights + first * p.points, points, grads);
    for (int64_t row = 0; row < rows; ++row) fusion.softmax[row] = known[softmax_index(p, first + row)];
    weigh_rows(fusion, fusion.softmax, rows, p.points, weights);
    unweigh_rows(fusion, weights, rows, p.points, grads);
    with_coordinate<T>(p, [&](auto coordinate) {
      narrow_array(grads, points, static_cast<decltype(coordinate)*>(p.grad_weights) + first * p.points);
    });
  });
}

}  // namespace
}  // namespace vitkern::VITKERN_ISA
