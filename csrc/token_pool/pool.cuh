// SPDX-License-Identifier: Apache-2.0
// Shared by the CUDA kernels of token_pool: the work split, and products of tokens' rows with pixels.
//
// Work split: a block takes a run of pixels of one image, kPixels at a time, for a group of tokens, and sums over
// a window of channels. All products have the tokens or the pixels in strips of 16. If the channels do not fit a
// window, the products over all channels go window by window, the block's own last.
#pragma once

#include "common/block_product.cuh"
#include "token_pool/params.h"

namespace vitkern {

// TokenPoolParams with the launch's choices: parts [B, splits, T] and [B, splits, T, C] in the accumulator type,
// of forward's triple (m, l, o) or of the gradient of the weight.
struct TokenPoolTask {
  TokenPoolParams p;
  int64_t splits;
  void *largest, *sums, *parts;
};

// Minimum number of blocks on an SM, for the register limit.
template <typename T>
constexpr int kPoolMinBlocks = sizeof(T) == 8 ? 1 : 2;

template <typename T_, int kTokenStrips_, int kWindow_>
struct PoolTile {
  using T = T_;
  using A = Accumulator<T>;
  static constexpr int kTokenStrips = kTokenStrips_, kPixelStrips = sizeof(T) == 2 && kWindow_ <= 256 ? 2 : 1;
  static constexpr int kTokens = kTokenStrips * kStrip, kPixels = kPixelStrips * kStrip, kWindow = kWindow_;

  // Each warp computes 16 x 16 logits, over a share of the channels if there are fewer such tiles than warps.
  static constexpr int kLogitTiles = kTokenStrips * kPixelStrips, kDepthSplits = kBlockWarps / kLogitTiles;
  static_assert(kLogitTiles * kDepthSplits == kBlockWarps);

  // In products over pixels or tokens, each warp has its own columns of the window.
  static constexpr int kColumnTiles =
      kWindow < kBlockWarps * kTileColumns ? 1 : kWindow / kBlockWarps / kTileColumns;

  // Neighbouring lanes share the softmax of a token: each takes every kLanes-th pixel.
  static constexpr int kLanes = kBlockThreads / kTokens, kPixelsOfLane = kPixels / kLanes;

  // In shared memory: tokens' rows and pixels [., kWindow], logits [kDepthSplits, kTokens, kPixels] of type A,
  // shares [kTokens, kPixels].
  static constexpr int kRowStride = kWindow + kRowPad<T>, kShareStride = kPixels + kRowPad<T>;
  static constexpr int kLogitStride = kPixels + kRowPad<A>;
  static constexpr int kLogits = kDepthSplits * kTokens * kLogitStride;

  static __device__ __forceinline__ int column() {
    return threadIdx.x / kWarpLanes * kColumnTiles * kTileColumns;
  }
  static __device__ __forceinline__ int token() { return threadIdx.x / kLanes; }
  static __device__ __forceinline__ int lane() { return threadIdx.x % kLanes; }
};

// The number of windows, at least one: without channels there are still logits.
__host__ __device__ constexpr int64_t windows_of(int64_t channels, int window) {
  return channels > window ? (channels + window - 1) / window : 1;
}

// The image, pixels [begin, end) and part of the channels of a block.
struct PoolPlace {
  int64_t image, split, group, window;
  int64_t begin, end;
};

// The i-th window of a pass, 1 <= i <= windows: the block's own comes last and stays in shared memory. A remainder of
// 64 bits would take too many registers: sm_120 spills them.
__device__ __forceinline__ int64_t window_after(const PoolPlace& place, int64_t i, int64_t windows) {
  return static_cast<uint32_t>(place.window + i) % static_cast<uint32_t>(windows);
}

template <typename Tile>
__device__ __forceinline__ PoolPlace pool_place(const TokenPoolTask& task, int64_t groups, int64_t windows) {
  PoolPlace place;
  const int64_t block = blockIdx.x, part = block / windows / groups;
  place.window = block % windows;
  place.group = block / windows % groups;
  place.image = part / task.splits;
  place.split = part % task.splits;
  const int64_t steps = (task.p.pixels + Tile::kPixels - 1) / Tile::kPixels;
  const int64_t run = (steps + task.splits - 1) / task.splits * Tile::kPixels;
  place.begin = min(place.split * run, task.p.pixels);
  place.end = min(place.begin + run, task.p.pixels);
  return place;
}

// The channels of a window as a depth.
template <typename Tile>
__device__ __forceinline__ int window_depth(const TokenPoolParams& p, int64_t window) {
  const int64_t left = p.channels - window * Tile::kWindow;
  return static_cast<int>((min(left, int64_t{Tile::kWindow}) + kDepthStep - 1) / kDepthStep * kDepthStep);
}

// logits[token, pixel] += the caller's warp's share of <row of token, pixel> over a window.
template <typename Tile, typename T>
__device__ __forceinline__ void add_logits(const T* rows, const T* pixels, int depth,
                                           Sums<typename Tile::A> (&logits)[2]) {
  const int warp = threadIdx.x / kWarpLanes, tile = warp % Tile::kLogitTiles;
  const int share = (depth / kDepthStep + Tile::kDepthSplits - 1) / Tile::kDepthSplits * kDepthStep;
  const int k = warp / Tile::kLogitTiles * share;
  const Factor<T, false> left{rows, Tile::kRowStride}, right{pixels, Tile::kRowStride};
  if (k < depth)
    multiply_add(left.from(tile / Tile::kPixelStrips * kStrip, k),
                 right.from(tile % Tile::kPixelStrips * kStrip, k), min(share, depth - k), logits);
}

template <typename Tile>
__device__ __forceinline__ void store_logits(const Sums<typename Tile::A> (&logits)[2],
                                             typename Tile::A* to) {
  const int warp = threadIdx.x / kWarpLanes, tile = warp % Tile::kLogitTiles;
  const int token = warp / Tile::kLogitTiles * Tile::kTokens + tile / Tile::kPixelStrips * kStrip;
  const int pixel = tile % Tile::kPixelStrips * kStrip;
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      to[(token + row_of_sum(i)) * Tile::kLogitStride + pixel + half * kTileColumns + column_of_sum(i)] =
          logits[half].at[i];
}

// The logit of the caller's token and a pixel, summed up over the warps' shares.
template <typename Tile>
__device__ __forceinline__ typename Tile::A logit(const typename Tile::A* logits, int pixel) {
  typename Tile::A sum = 0;
#pragma unroll
  for (int split = 0; split < Tile::kDepthSplits; ++split)
    sum += logits[(split * Tile::kTokens + Tile::token()) * Tile::kLogitStride + pixel];
  return sum;
}

// Writes the block's window of its part [T, C] of a sum over pixels, minus less(token of group, index in [B, T, C]).
template <typename Tile, typename Less>
__device__ __forceinline__ void store_part_of_tokens(
    const TokenPoolTask& task, const PoolPlace& place,
    const Sums<typename Tile::A> (&sums)[Tile::kTokenStrips][Tile::kColumnTiles], const Less& less) {
  using A = typename Tile::A;
  const int64_t tokens = task.p.tokens, channels = task.p.channels,
                part = place.image * task.splits + place.split;
#pragma unroll
  for (int strip = 0; strip < Tile::kTokenStrips; ++strip)
#pragma unroll
    for (int tile = 0; tile < Tile::kColumnTiles; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = strip * kStrip + row_of_sum(i);
        const int64_t t = place.group * Tile::kTokens + token;
        const int column = Tile::column() + tile * kTileColumns + column_of_sum(i);
        const int64_t c = place.window * Tile::kWindow + column;
        if (t < tokens && column < Tile::kWindow && c < channels)
          static_cast<A*>(task.parts)[(part * tokens + t) * channels + c] =
              sums[strip][tile].at[i] - less(token, (place.image * tokens + t) * channels + c);
      }
}

}  // namespace vitkern
