// SPDX-License-Identifier: Apache-2.0
// token_pool forward, eqs. (1) to (4) of docs/derivations/token_pool.md.
//
// Work split: a block (pool.cuh) reduces its pixels to the triple (m, l, o) of eq. (4); o stays in registers.
// token_pool_merge merges an image's triples.
// Memory: pixels are read once if their channels fit a window; the parts are small compared to x.
// Numerics: logits, softmax and sums in the accumulator type; exp(s - m) is rounded to the type of x before the
// product with the pixels. No exponent is positive. NaN and infinities stay.
#pragma once

#include "token_pool/pool.cuh"

namespace vitkern {

// The shared memory of a block of forward.
template <typename Tile>
struct PoolForwardShared {
  typename Tile::A *logits, *rescale;
  typename Tile::T *rows, *pixels, *shares;

  static constexpr int kNumbers = Tile::kLogits + Tile::kTokens;
  static constexpr int kElements =
      (Tile::kTokens + Tile::kPixels) * Tile::kRowStride + Tile::kTokens * Tile::kShareStride;
  static constexpr int kBytes =
      kNumbers * int{sizeof(typename Tile::A)} + kElements * int{sizeof(typename Tile::T)};

  __device__ __forceinline__ explicit PoolForwardShared(unsigned char* bytes) {
    logits = reinterpret_cast<typename Tile::A*>(bytes);
    rescale = logits + Tile::kLogits;
    rows = reinterpret_cast<typename Tile::T*>(rescale + Tile::kTokens);
    pixels = rows + Tile::kTokens * Tile::kRowStride;
    shares = pixels + Tile::kPixels * Tile::kRowStride;
  }
};

// m and l of the caller's token; all lanes of a token hold the same numbers.
template <typename A>
struct Running {
  A largest, sum;
};

// Adds the logits of kPixels pixels, the first `count` of them real, to the running softmax. Writes exp(s - m) to
// shared.shares and the factor of the running sums to shared.rescale.
template <typename Tile>
__device__ __forceinline__ void take_pixels(const PoolForwardShared<Tile>& shared, int64_t count,
                                            Running<typename Tile::A>& running) {
  using T = typename Tile::T;
  using A = typename Tile::A;
  A s[Tile::kPixelsOfLane], largest = running.largest, sum = 0;
#pragma unroll
  for (int i = 0; i < Tile::kPixelsOfLane; ++i) {
    const int pixel = Tile::lane() + i * Tile::kLanes;
    s[i] = pixel < count ? logit<Tile>(shared.logits, pixel) : -INFINITY;
    largest = fmax(largest, s[i]);
  }
  largest = team_reduce<Tile::kLanes>(largest, [](A one, A other) { return fmax(one, other); });
  const A shift = largest == -INFINITY ? A{0} : largest;  // all are 0 then, not exp(-inf + inf)
#pragma unroll
  for (int i = 0; i < Tile::kPixelsOfLane; ++i) {
    const A share = exp(s[i] - shift);
    sum += share;
    shared.shares[Tile::token() * Tile::kShareStride + Tile::lane() + i * Tile::kLanes] = narrow<T>(share);
  }
  sum = team_reduce<Tile::kLanes>(sum, [](A one, A other) { return one + other; });
  const A factor = exp(running.largest - shift);
  if (Tile::lane() == 0) shared.rescale[Tile::token()] = factor;
  running = {largest, running.sum * factor + sum};
}

template <typename T, int kTokenStrips, int kWindow>
__global__ void __launch_bounds__(kBlockThreads, kPoolMinBlocks<T>)
    token_pool_forward(const __grid_constant__ TokenPoolTask task) {
  using Tile = PoolTile<T, kTokenStrips, kWindow>;
  using A = Accumulator<T>;
  VITKERN_DYNAMIC_SHARED(unsigned char, bytes);
  const PoolForwardShared<Tile> shared(bytes);
  static_assert(PoolForwardShared<Tile>::kBytes <= kSharedBytesOfAnyCard);
  const TokenPoolParams& p = task.p;
  const int64_t windows = windows_of(p.channels, kWindow);
  const PoolPlace place = pool_place<Tile>(task, (p.tokens + Tile::kTokens - 1) / Tile::kTokens, windows);
  const Matrix<T> weight(
      static_cast<const T*>(p.weight) + (p.weight_per_image ? place.image * p.tokens * p.channels : 0),
      p.tokens, p.channels);
  const Matrix<T> x(static_cast<const T*>(p.x) + place.image * p.pixels * p.channels, place.end, p.channels);

  Running<A> running = {-INFINITY, 0};
  Sums<A> sums[kTokenStrips][Tile::kColumnTiles] = {};
  for (int64_t pixel = place.begin; pixel < place.end; pixel += Tile::kPixels) {
    Sums<A> own_logits[2] = {};
    for (int64_t i = 1; i <= windows; ++i) {
      const int64_t window = window_after(place, i, windows);
      __syncthreads();  // the last pixels are read
      if (windows > 1 || pixel == place.begin)
        copy_tile<Tile::kTokens, kWindow>(shared.rows, weight, place.group * Tile::kTokens, window * kWindow);
      copy_tile<Tile::kPixels, kWindow>(shared.pixels, x, pixel, window * kWindow);
      wait_for_copies();
      __syncthreads();
      add_logits<Tile>(shared.rows, shared.pixels, window_depth<Tile>(p, window), own_logits);
    }
    store_logits<Tile>(own_logits, shared.logits);
    __syncthreads();
    take_pixels<Tile>(shared, place.end - pixel, running);
    __syncthreads();

    if (Tile::column() >= window_depth<Tile>(p, place.window)) continue;
#pragma unroll
    for (int strip = 0; strip < kTokenStrips; ++strip) {
#pragma unroll
      for (int tile = 0; tile < Tile::kColumnTiles; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[strip][tile].at[i] *= shared.rescale[strip * kStrip + row_of_sum(i)];
      multiply_add(Factor<T, false>{shared.shares, Tile::kShareStride}.from(strip * kStrip, 0),
                   Factor<T, true>{shared.pixels, Tile::kRowStride}.from(Tile::column(), 0), Tile::kPixels,
                   sums[strip]);
    }
  }

  store_part_of_tokens<Tile>(task, place, sums, [](int, int64_t) { return A{0}; });
  const int64_t token = place.group * Tile::kTokens + Tile::token();
  if (place.window == 0 && Tile::lane() == 0 && token < p.tokens) {
    const int64_t index = (place.image * task.splits + place.split) * p.tokens + token;
    static_cast<A*>(task.largest)[index] = running.largest;
    static_cast<A*>(task.sums)[index] = running.sum;
  }
}

// Eq. (4) over the splits: one block for each image and token, with threads along the channels.
template <typename T>
__global__ void __launch_bounds__(kBlockThreads)
    token_pool_merge(const __grid_constant__ TokenPoolTask task) {
  using A = Accumulator<T>;
  __shared__ A factors[kBlockThreads];  // of the splits; there are at most kBlockThreads
  const TokenPoolParams& p = task.p;
  const int64_t image = blockIdx.x / p.tokens, token = blockIdx.x % p.tokens;
  const int64_t first = image * task.splits * p.tokens + token;  // part s lies s * T further
  const A* largest_logits = static_cast<const A*>(task.largest) + first;
  const A* sum_of = static_cast<const A*>(task.sums) + first;

  A largest = -INFINITY, sum = 0;
  for (int64_t split = 0; split < task.splits; ++split)
    largest = fmax(largest, largest_logits[split * p.tokens]);
  const A shift = largest == -INFINITY ? A{0} : largest;
  if (threadIdx.x < task.splits) factors[threadIdx.x] = exp(largest_logits[threadIdx.x * p.tokens] - shift);
  __syncthreads();
  for (int64_t split = 0; split < task.splits; ++split) sum += factors[split] * sum_of[split * p.tokens];

  const A* parts = static_cast<const A*>(task.parts) + first * p.channels;
  for (int64_t c = threadIdx.x; c < p.channels; c += kBlockThreads) {
    A mean = 0;
#pragma unroll 4
    for (int64_t split = 0; split < task.splits; ++split)
      mean += factors[split] * parts[split * p.tokens * p.channels + c];
    // Without pixels there is no mean.
    static_cast<T*>(p.output)[blockIdx.x * p.channels + c] = narrow<T>(p.pixels ? mean / sum : A{0});
  }
  if (threadIdx.x > 0) return;
  A* statistics = static_cast<A*>(p.statistics) + image * 2 * p.tokens + token;
  statistics[0] = largest;
  statistics[p.tokens] = sum;
}

}  // namespace vitkern
