// SPDX-License-Identifier: Apache-2.0
// Backward: gradients of value, weights and locations, eqs. (5) to (7), without atomics.
//
// Work split: a task is (image, head), or (image, head, level) where threads are many: it alone adds to the
// gradient of its levels' rows, and it alone owns the gradients of their points. Each row gets the same sums
// in the same order either way. Where heads are few, the queries are cut into a number of chunks that depends
// on the shapes only; each adds to a slab of its own, and the slabs are summed in their order. So results do
// not depend on the number of threads.
// Memory: if points touch rows several times, a task copies its rows side by side, and adds to a slab of
// accumulators that is written to grad_value once.
#pragma once

#include "ms_deform_attn/cpu_logits.h"
#include "ms_deform_attn/cpu_scatter.h"

namespace vitkern::VITKERN_ISA {
namespace {

constexpr int64_t kEnoughHeads = 8;  // of all images; with fewer, queries are cut into chunks
constexpr int64_t kRowsAhead = 8;    // rows lie M * D numbers apart, where no chip prefetches by itself
constexpr int64_t kMinChunkQueries = 256;
constexpr int64_t kMaxSlabBytes = int64_t{64} << 20;  // of all chunks' slabs together

// One head's rows [begin, begin + count) of an image, side by side behind a row of zeros, widened, channels padded with
// zeros.
template <typename T>
void pack_head(const MsDeformAttnParams& p, int64_t image, int64_t head, int64_t begin, int64_t count,
               int64_t channels, Accumulator<T>* packed) {
  const T* value =
      static_cast<const T*>(p.value) + ((image * p.pixels + begin) * p.heads + head) * p.channels;
  memset(packed, 0, channels * sizeof(*packed));
  packed += channels;
  for (int64_t pixel = 0; pixel < count; ++pixel, packed += channels) {
    prefetch_row(value + (pixel + kRowsAhead) * p.heads * p.channels, p.channels);
    widen_array(value + pixel * p.heads * p.channels, p.channels, packed);
    for (int64_t channel = p.channels; channel < channels; ++channel) packed[channel] = 0;
  }
}

// Rows of a slab to grad_value, rounded once.
template <typename T>
void write_rows(const MsDeformAttnParams& p, int64_t image, int64_t head, int64_t begin, int64_t count,
                int64_t channels, const Accumulator<T>* slab) {
  T* to = static_cast<T*>(p.grad_value) + ((image * p.pixels + begin) * p.heads + head) * p.channels;
  for (int64_t pixel = 0; pixel < count; ++pixel) {
    prefetch_row_write(to + (pixel + kRowsAhead) * p.heads * p.channels, p.channels);
    narrow_array(slab + pixel * channels, p.channels, to + pixel * p.heads * p.channels);
  }
}

// How the work of one call is cut.
struct BackwardPlan {
  Group* groups;
  int64_t group_count, chunks;
  int64_t channels;      // padded
  int64_t widest_group;  // pixels
  bool packs;

  // The fused form, tasks of one level: each sees but a part of a softmax.
  bool parts_softmax;

  // Where gradients of rows are added up: in grad_value itself, in slabs of the chunks, in a slab of each
  // worker, or nowhere.
  bool in_place, shared_slabs;
  int64_t value_rows, slab_rows;  // of a worker
  int64_t head_rows;  // of a chunk's slab: pixels of all groups, with a row for corners outside each
  int64_t slab_size;  // of a chunk
};

// Levels that share pixels must be added up by one task.
inline bool levels_overlap(const Level* levels, int64_t count) {
  for (const Level* a = levels; a < levels + count; ++a)
    for (const Level* b = levels; b < a; ++b)
      if (a->start < b->start + b->pixels() && b->start < a->start + a->pixels()) return true;
  return false;
}

template <typename T>
BackwardPlan cut_backward(const MsDeformAttnParams& p, const Level* levels, Group* groups) {
  using Acc = Accumulator<T>;
  BackwardPlan plan{};
  plan.groups = groups;
  plan.group_count = p.levels;
  plan.chunks = 1;
  plan.channels = whole_vectors<Acc>(p.channels);
  const int64_t heads = p.batch * p.heads;
  if (heads >= 2 * p.threads || levels_overlap(levels, p.levels)) {
    plan.group_count = 1;
    groups[0] = {levels, p.levels, 0, p.pixels, 0};
    plan.widest_group = p.pixels;
  } else {
    int64_t row = 0;
    for (int64_t i = 0; i < p.levels; ++i) {
      groups[i] = {levels + i, 1, levels[i].start, levels[i].pixels(), row};
      row += 1 + groups[i].pixels;
      if (groups[i].pixels > plan.widest_group) plan.widest_group = groups[i].pixels;
    }
  }
  plan.packs = plan.channels != p.channels || p.queries * p.points >= p.pixels;
  plan.parts_softmax = p.reference.points && plan.group_count > 1;
  plan.chunks = divide_up(kEnoughHeads, heads);
  const int64_t slab_bytes = heads * p.pixels * plan.channels * static_cast<int64_t>(sizeof(Acc));
  // Each chunk must be worth its slab.
  const int64_t most[] = {p.queries / kMinChunkQueries, p.pixels ? p.queries * p.points / p.pixels : 1,
                          slab_bytes ? kMaxSlabBytes / slab_bytes : 1};
  for (const int64_t bound : most)
    if (plan.chunks > bound) plan.chunks = bound < 1 ? 1 : bound;
  return plan;
}

template <typename T>
BackwardPlan plan_backward(const MsDeformAttnParams& p, const Level* levels, Group* groups) {
  BackwardPlan plan = cut_backward<T>(p, levels, groups);
  // Few points on many pixels: add to grad_value itself, if it can hold sums.
  plan.in_place = sizeof(T) == sizeof(Accumulator<T>) && !plan.packs && plan.chunks == 1;
  plan.shared_slabs = plan.chunks > 1 && p.grad_value;
  plan.value_rows = plan.packs ? 1 + plan.widest_group : 0;
  plan.slab_rows = plan.shared_slabs || !p.grad_value ? 0 : plan.in_place ? 1 : 1 + plan.widest_group;
  for (const Group* group = groups; group < groups + plan.group_count; ++group)
    plan.head_rows += 1 + group->pixels;
  plan.slab_size = p.batch * p.heads * plan.head_rows * plan.channels;
  return plan;
}

// Pixels that no group covers have no gradient.
template <typename T>
void clear_gaps(const MsDeformAttnParams& p, const BackwardPlan& plan, int64_t image) {
  T* const grad = static_cast<T*>(p.grad_value) + image * p.pixels * p.heads * p.channels;
  for (int64_t pixel = 0; pixel < p.pixels;) {
    int64_t next = p.pixels, covered_to = pixel;
    for (const Group* group = plan.groups; group < plan.groups + plan.group_count; ++group) {
      const int64_t end = group->first_pixel + group->pixels;
      if (group->first_pixel <= pixel && end > covered_to) covered_to = end;
      if (group->first_pixel > pixel && group->pixels && group->first_pixel < next) next = group->first_pixel;
    }
    if (covered_to == pixel) {
      memset(static_cast<void*>(grad + pixel * p.heads * p.channels), 0,
             (next - pixel) * p.heads * p.channels * sizeof(T));
      covered_to = next;
    }
    pixel = covered_to;
  }
}

// All of grad_value, before it is added to in place: in one stretch, however the heads lie in it.
template <typename T>
void clear_value(const MsDeformAttnParams& p) {
  constexpr int64_t kStretch = int64_t{256} << 10;
  const int64_t bytes = p.batch * p.pixels * p.heads * p.channels * static_cast<int64_t>(sizeof(T));
  char* const grad = static_cast<char*>(p.grad_value);
  parallel_for(divide_up(bytes, kStretch), p.threads, [&](int64_t task, int) {
    const int64_t begin = task * kStretch, rest = bytes - begin;
    memset(grad + begin, 0, rest < kStretch ? rest : kStretch);
  });
}

// Sums the chunks' slabs in their order, into the first, and writes them out.
template <typename T>
void merge_slabs(const MsDeformAttnParams& p, const BackwardPlan& plan, Accumulator<T>* slabs) {
  using Acc = Accumulator<T>;
  parallel_for(p.batch * p.heads * plan.group_count, p.threads, [&](int64_t task, int) {
    const Group& group = plan.groups[task % plan.group_count];
    const int64_t head = task / plan.group_count % p.heads, image = task / plan.group_count / p.heads;
    const int64_t first_row = (image * p.heads + head) * plan.head_rows + group.first_row + 1;
    Acc* const first = slabs + first_row * plan.channels;
    for (int64_t chunk = 1; chunk < plan.chunks; ++chunk)
      for (int64_t i = 0; i < group.pixels * plan.channels; ++i)
        first[i] += first[chunk * plan.slab_size + i];
    write_rows<T>(p, image, head, group.first_pixel, group.pixels, plan.channels, first);
  });
}

// The memory of a call.
template <typename T>
struct BackwardMemory {
  using Acc = Accumulator<T>;
  BackwardWorker<T>* workers;
  Acc* outside;           // [channels] zeros
  Acc* slabs;             // [chunks, B, M, head_rows, channels]
  Softmax<Acc>* softmax;  // [B, M, Q], where tasks see parts of a softmax only
  Acc* grad_weights;      // [B, Q, M, K], the same, with gradients of 16 bits only

  void lay_out(Cursor& cursor, const MsDeformAttnParams& p, const BackwardPlan& plan, int count) {
    const int64_t rows = plan.parts_softmax ? p.batch * p.queries * p.heads : 0;
    const bool parks = p.grad_weights && p.coord_dtype != accumulator(p.coord_dtype);
    workers = cursor.take<BackwardWorker<T>>(count);
    outside = cursor.take<Acc>(plan.channels);
    slabs = cursor.take<Acc>(plan.shared_slabs ? plan.chunks * plan.slab_size : 0);
    softmax = cursor.take<Softmax<Acc>>(rows);
    grad_weights = cursor.take<Acc>(parks ? rows * p.points : 0);
    if (!parks) grad_weights = static_cast<Acc*>(p.grad_weights);
    for (int i = 0; i < count; ++i) {
      BackwardWorker<T> measured;
      (cursor.base ? workers[i] : measured)
          .lay_out(cursor, p, plan.channels, plan.value_rows, plan.slab_rows);
    }
  }

  void clear(const BackwardPlan& plan, int count) {
    memset(outside, 0, plan.channels * sizeof(Acc));
    for (int i = 0; i < count; ++i)
      memset(workers[i].grad_output, 0, kTileQueries * plan.channels * sizeof(Acc));
  }

  // The pass before tasks that see parts of a softmax.
  void measure(const MsDeformAttnParams& p, int count) {
    measure_logits<T>(p, workers, count, softmax);
    for (int i = 0; i < count; ++i) {
      workers[i].fusion.known = softmax;
      workers[i].fusion.grad_weights = grad_weights;
    }
  }
};

// One task: the queries of a chunk, the points of a group.
template <int kUsed, typename T>
void backward_task(const MsDeformAttnParams& p, const BackwardPlan& plan, const BackwardMemory<T>& memory,
                   int64_t task, BackwardWorker<T>& mine) {
  using Acc = Accumulator<T>;
  const int64_t chunk = task % plan.chunks, owner = task / plan.chunks;
  const Group& group = plan.groups[owner % plan.group_count];
  const int64_t head = owner / plan.group_count % p.heads, image = owner / plan.group_count / p.heads;
  const int64_t first_row = (image * p.pixels + group.first_pixel) * p.heads + head;  // in [B, S, M]
  set_levels(mine.tile, group.levels, group.count, group.first_pixel);
  if (p.reference.points) set_fusion(mine.fusion, mine.tile, group.levels, group.count);

  Acc* slab = mine.slab;
  if (plan.shared_slabs)
    slab = memory.slabs + chunk * plan.slab_size +
           ((image * p.heads + head) * plan.head_rows + group.first_row) * plan.channels;
  Acc* const sums = slab + plan.channels;  // of the first pixel, behind what corners outside add up
  if (p.grad_value && !plan.in_place) memset(slab, 0, (1 + group.pixels) * plan.channels * sizeof(Acc));
  const int64_t begin = p.queries * chunk / plan.chunks, end = p.queries * (chunk + 1) / plan.chunks;
  if (plan.packs) {
    pack_head<T>(p, image, head, group.first_pixel, group.pixels, plan.channels, mine.value);
    const PackedRows<const Acc> values = {mine.value + plan.channels, plan.channels};
    const PackedRows<Acc> gradients = {sums, plan.channels};
    backward_queries<kUsed, T>(p, mine, values, gradients, group, image, head, begin, end);
  } else {
    const T* value = static_cast<const T*>(p.value) + first_row * p.channels;
    const Rows<const T> values = {value, p.heads * p.channels, reinterpret_cast<const T*>(memory.outside)};
    Rows<Acc> gradients = {sums, plan.channels, slab};
    if (plan.in_place) {
      gradients.base = static_cast<Acc*>(p.grad_value) + first_row * p.channels;
      gradients.stride = p.heads * p.channels;
    }
    backward_queries<kUsed, T>(p, mine, values, gradients, group, image, head, begin, end);
  }
  if (p.grad_value && !plan.in_place && !plan.shared_slabs)
    write_rows<T>(p, image, head, group.first_pixel, group.pixels, plan.channels, sums);
}

template <typename T>
void prefer_huge_gradients(const MsDeformAttnParams& p) {
  const size_t rows = p.batch * p.queries * p.heads * p.points, coordinate = coordinate_bytes<T>(p);
  if (p.grad_value) prefer_huge_pages(p.grad_value, p.batch * p.pixels * p.heads * p.channels * sizeof(T));
  if (p.grad_locations) prefer_huge_pages(p.grad_locations, 2 * rows * coordinate);
  if (p.grad_weights) prefer_huge_pages(p.grad_weights, rows * coordinate);
  if (p.grad_computed) prefer_huge_pages(p.grad_computed, 2 * rows * sizeof(Accumulator<T>));
}

template <int kUsed, typename T>
void backward(const MsDeformAttnParams& p, const Level* levels, Group* groups) {
  const BackwardPlan plan = plan_backward<T>(p, levels, groups);
  const int64_t tasks = p.batch * p.heads * plan.group_count * plan.chunks;
  const int workers = worker_count(tasks, p.threads);

  BackwardMemory<T> memory;
  const Arena arena([&](Cursor& cursor) { memory.lay_out(cursor, p, plan, workers); });
  memory.clear(plan, workers);

  prefer_huge_gradients<T>(p);
  if (plan.in_place && p.grad_value) clear_value<T>(p);
  if (plan.parts_softmax) memory.measure(p, workers);
  parallel_for(tasks, p.threads, [&](int64_t task, int who) {
    backward_task<kUsed, T>(p, plan, memory, task, memory.workers[who]);
  });
  if (plan.parts_softmax && p.grad_weights) finish_logits<T>(p, memory.workers, workers, memory.softmax);

  if (p.grad_value)
    for (int64_t image = 0; image < p.batch; ++image) clear_gaps<T>(p, plan, image);
  if (plan.shared_slabs) merge_slabs<T>(p, plan, memory.slabs);
}

}  // namespace
}  // namespace vitkern::VITKERN_ISA
