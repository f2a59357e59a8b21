// SPDX-License-Identifier: Apache-2.0
// token_pool backward, eqs. (5) to (9) of docs/derivations/token_pool.md.
//
// Work split: a block (pool.cuh) loops over its pixels once: it computes A and f, writes the gradient of the
// pixels, and keeps the gradient of the weight in registers until the end. With more than kTokens tokens it
// repeats this for each group of tokens.
// Memory: pixels are read once and their gradient is written once if the channels fit a window and the tokens a
// group; the parts of the weight's gradient are small compared to x.
// Numerics: A and f in the accumulator type, rounded to the type of x before the products. (5) uses the code of the
// products of (6): f is exactly 0 if a token is one pixel. No atomics: parts are added in a fixed order.
// Each group of tokens rounds the gradient of the pixels to the type of x: once up to kTokens tokens.
#pragma once

#include "token_pool/pool.cuh"

namespace vitkern {

// The shared memory of a block of backward.
template <typename Tile>
struct PoolBackwardShared {
  typename Tile::A *logits, *products;                  // products: <g, x>
  typename Tile::A *largest, *inverse, *delta, *f_sum;  // for each token: m, 1 / l, eq. (5), sum of f
  typename Tile::T *rows, *grads, *pixels, *shares, *f;

  static constexpr int kNumbers = 2 * Tile::kLogits + 4 * Tile::kTokens;
  static constexpr int kElements =
      (2 * Tile::kTokens + Tile::kPixels) * Tile::kRowStride + 2 * Tile::kTokens * Tile::kShareStride;
  static constexpr int kBytes =
      kNumbers * int{sizeof(typename Tile::A)} + kElements * int{sizeof(typename Tile::T)};

  __device__ __forceinline__ explicit PoolBackwardShared(unsigned char* bytes) {
    logits = reinterpret_cast<typename Tile::A*>(bytes);
    products = logits + Tile::kLogits;
    largest = products + Tile::kLogits;
    inverse = largest + Tile::kTokens;
    delta = inverse + Tile::kTokens;
    f_sum = delta + Tile::kTokens;
    rows = reinterpret_cast<typename Tile::T*>(f_sum + Tile::kTokens);
    grads = rows + Tile::kTokens * Tile::kRowStride;
    pixels = grads + Tile::kTokens * Tile::kRowStride;
    shares = pixels + Tile::kPixels * Tile::kRowStride;
    f = shares + Tile::kTokens * Tile::kShareStride;
  }
};

// Eq. (5), with tokens in place of pixels, and forward's statistics, for the group's tokens.
template <typename Tile, typename T>
__device__ __forceinline__ void load_tokens(const TokenPoolParams& p, const PoolPlace& place, int64_t windows,
                                            const Matrix<T>& grad, const PoolBackwardShared<Tile>& shared) {
  using A = typename Tile::A;
  const int64_t first = place.group * Tile::kTokens, token = first + Tile::token();
  const Matrix<T> pooled(static_cast<const T*>(p.pooled) + place.image * p.tokens * p.channels, p.tokens,
                         p.channels);
  for (int begin = 0; begin < Tile::kTokens; begin += Tile::kPixels) {
    Sums<A> products[2] = {};
    for (int64_t i = 1; i <= windows; ++i) {
      const int64_t window = window_after(place, i, windows);
      __syncthreads();  // the last rows are read, and the last group's numbers
      copy_tile<Tile::kTokens, Tile::kWindow>(shared.grads, grad, first, window * Tile::kWindow);
      copy_tile<Tile::kPixels, Tile::kWindow>(shared.pixels, pooled, first + begin, window * Tile::kWindow);
      wait_for_copies();
      __syncthreads();
      add_logits<Tile>(shared.grads, shared.pixels, window_depth<Tile>(p, window), products);
    }
    store_logits<Tile>(products, shared.products);
    __syncthreads();
    const int own = Tile::token() - begin;
    if (Tile::lane() == 0 && own >= 0 && own < Tile::kPixels)
      shared.delta[Tile::token()] = logit<Tile>(shared.products, own);
  }
  if (Tile::lane() != 0) return;
  shared.f_sum[Tile::token()] = 0;
  const A* statistics = static_cast<const A*>(p.statistics) + place.image * 2 * p.tokens + token;
  shared.largest[Tile::token()] = token < p.tokens ? statistics[0] : A{0};
  shared.inverse[Tile::token()] = token < p.tokens ? 1 / statistics[p.tokens] : A{0};
}

// A and f of eqs. (2) and (6), zero for padding pixels and tokens; f is also added to its sum.
template <typename Tile>
__device__ __forceinline__ void attention_gradients(const PoolBackwardShared<Tile>& shared,
                                                    int64_t pixels_left, int64_t tokens_left) {
  using T = typename Tile::T;
  using A = typename Tile::A;
  const int token = Tile::token();
  A f_sum = 0;
#pragma unroll
  for (int i = 0; i < Tile::kPixelsOfLane; ++i) {
    const int pixel = Tile::lane() + i * Tile::kLanes;
    A share = 0, f = 0;
    if (pixel < pixels_left && token < tokens_left) {
      share = exp(logit<Tile>(shared.logits, pixel) - shared.largest[token]) * shared.inverse[token];
      f = share * (logit<Tile>(shared.products, pixel) - shared.delta[token]);
    }
    const T rounded = narrow<T>(f);
    f_sum += widen(rounded);
    shared.shares[token * Tile::kShareStride + pixel] = narrow<T>(share);
    shared.f[token * Tile::kShareStride + pixel] = rounded;
  }
  f_sum = team_reduce<Tile::kLanes>(f_sum, [](A one, A other) { return one + other; });
  if (Tile::lane() == 0) shared.f_sum[token] += f_sum;
}

// Eq. (7) for the caller's warp's columns, over the pixels in shared memory.
template <typename Tile>
__device__ __forceinline__ void replace_pixels(const PoolBackwardShared<Tile>& shared) {
  using T = typename Tile::T;
  const Factor<T, true> shares{shared.shares, Tile::kShareStride}, f{shared.f, Tile::kShareStride};
  const Factor<T, true> rows{shared.rows, Tile::kRowStride}, grads{shared.grads, Tile::kRowStride};
  constexpr int kAtOnce =
      Tile::kColumnTiles < 4 ? Tile::kColumnTiles : 4;  // tiles; more take too many registers
#pragma unroll
  for (int strip = 0; strip < Tile::kPixelStrips; ++strip) {
#pragma unroll 1
    for (int first = Tile::column(); first < Tile::column() + Tile::kColumnTiles * kTileColumns;
         first += kAtOnce * kTileColumns) {
      Sums<typename Tile::A> sums[kAtOnce] = {};
      multiply_add(shares.from(strip * kStrip, 0), grads.from(first, 0), Tile::kTokens, sums);
      multiply_add(f.from(strip * kStrip, 0), rows.from(first, 0), Tile::kTokens, sums);
#pragma unroll
      for (int tile = 0; tile < kAtOnce; ++tile)
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          const int row = strip * kStrip + row_of_sum(i);
          const int column = first + tile * kTileColumns + column_of_sum(i);
          *reinterpret_cast<Vector<T, 2>*>(shared.pixels + row * Tile::kRowStride + column) = {
              narrow<T>(sums[tile].at[i]), narrow<T>(sums[tile].at[i + 1])};
        }
    }
  }
}

// Writes the gradient from shared memory to the window of grad_x; adds it from the second group of tokens on.
template <typename Tile>
__device__ __forceinline__ void write_pixels(const TokenPoolParams& p, const PoolPlace& place, int64_t pixel,
                                             const typename Tile::T* pixels) {
  using T = typename Tile::T;
  using A = typename Tile::A;
  constexpr int kVector = kVectorBytes / sizeof(T), kPerRow = Tile::kWindow / kVector;
  T* grad_x = static_cast<T*>(p.grad_x) + place.image * p.pixels * p.channels;
  const bool vectors = Matrix<T>(grad_x, p.pixels, p.channels).vectors;
  for (int slot = threadIdx.x; slot < Tile::kPixels * kPerRow; slot += kBlockThreads) {
    const int row = slot / kPerRow, column = slot % kPerRow * kVector;
    const int64_t c = place.window * Tile::kWindow + column;
    if (pixel + row >= place.end || c >= p.channels) continue;
    T* target = grad_x + (pixel + row) * p.channels;
    A grad[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      grad[i] = widen(pixels[row * Tile::kRowStride + column + i]);
      if (place.group > 0 && c + i < p.channels) grad[i] += widen(target[c + i]);
    }
    store_part(target, c, p.channels, vectors, grad);
  }
}

// Eq. (9) from the sums of (8) over the block's pixels.
template <typename Tile>
__device__ __forceinline__ void store_weight_gradient(
    const TokenPoolTask& task, const PoolPlace& place, const PoolBackwardShared<Tile>& shared,
    const Sums<typename Tile::A> (&sums)[Tile::kTokenStrips][Tile::kColumnTiles]) {
  using T = typename Tile::T;
  __syncthreads();  // without pixels, this is the only barrier after the sums of f
  store_part_of_tokens<Tile>(task, place, sums, [&](int token, int64_t index) {
    return shared.f_sum[token] * widen(__ldg(static_cast<const T*>(task.p.pooled) + index));
  });
}

// One group of tokens over all of the block's pixels.
template <typename Tile>
__device__ __forceinline__ void backward_group(const TokenPoolTask& task, const PoolPlace& place,
                                               int64_t windows, const PoolBackwardShared<Tile>& shared) {
  using T = typename Tile::T;
  using A = typename Tile::A;
  const TokenPoolParams& p = task.p;
  const int64_t image_tokens = place.image * p.tokens * p.channels, token = place.group * Tile::kTokens;
  const Matrix<T> weight(static_cast<const T*>(p.weight) + (p.weight_per_image ? image_tokens : 0), p.tokens,
                         p.channels);
  const Matrix<T> grad(static_cast<const T*>(p.grad_output) + image_tokens, p.tokens, p.channels);
  const Matrix<T> x(static_cast<const T*>(p.x) + place.image * p.pixels * p.channels, place.end, p.channels);
  const bool has_columns = Tile::column() < window_depth<Tile>(p, place.window);
  load_tokens<Tile>(p, place, windows, grad, shared);

  Sums<A> sums[Tile::kTokenStrips][Tile::kColumnTiles] = {};
  for (int64_t pixel = place.begin; pixel < place.end; pixel += Tile::kPixels) {
    Sums<A> logits[2] = {}, products[2] = {};
    for (int64_t i = 1; i <= windows; ++i) {
      const int64_t window = window_after(place, i, windows);
      __syncthreads();  // the last pixels are read
      if (windows > 1 || pixel == place.begin) {
        copy_tile<Tile::kTokens, Tile::kWindow>(shared.rows, weight, token, window * Tile::kWindow);
        copy_tile<Tile::kTokens, Tile::kWindow>(shared.grads, grad, token, window * Tile::kWindow);
      }
      copy_tile<Tile::kPixels, Tile::kWindow>(shared.pixels, x, pixel, window * Tile::kWindow);
      wait_for_copies();
      __syncthreads();
      add_logits<Tile>(shared.rows, shared.pixels, window_depth<Tile>(p, window), logits);
      add_logits<Tile>(shared.grads, shared.pixels, window_depth<Tile>(p, window), products);
    }
    store_logits<Tile>(logits, shared.logits);
    store_logits<Tile>(products, shared.products);
    __syncthreads();
    attention_gradients<Tile>(shared, place.end - pixel, p.tokens - token);
    __syncthreads();

    if (has_columns && p.grad_weight) {  // eq. (8)
#pragma unroll
      for (int strip = 0; strip < Tile::kTokenStrips; ++strip)
        multiply_add(Factor<T, false>{shared.f, Tile::kShareStride}.from(strip * kStrip, 0),
                     Factor<T, true>{shared.pixels, Tile::kRowStride}.from(Tile::column(), 0), Tile::kPixels,
                     sums[strip]);
    }
    if (!p.grad_x) continue;
    __syncwarp();  // the warp's columns are read
    if (has_columns) replace_pixels<Tile>(shared);
    __syncthreads();
    write_pixels<Tile>(p, place, pixel, shared.pixels);
  }
  if (p.grad_weight) store_weight_gradient<Tile>(task, place, shared, sums);
}

template <typename T, int kTokenStrips, int kWindow>
__global__ void __launch_bounds__(kBlockThreads, kPoolMinBlocks<T>)
    token_pool_backward(const __grid_constant__ TokenPoolTask task) {
  using Tile = PoolTile<T, kTokenStrips, kWindow>;
  VITKERN_DYNAMIC_SHARED(unsigned char, bytes);
  const PoolBackwardShared<Tile> shared(bytes);
  static_assert(PoolBackwardShared<Tile>::kBytes <= kSharedBytesOfAnyCard);
  const int64_t windows = windows_of(task.p.channels, kWindow);
  PoolPlace place = pool_place<Tile>(task, 1, windows);
  for (place.group = 0; place.group * Tile::kTokens < task.p.tokens; ++place.group)
    backward_group<Tile>(task, place, windows, shared);
}

}  // namespace vitkern
