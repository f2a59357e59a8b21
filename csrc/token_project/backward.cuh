// SPDX-License-Identifier: Apache-2.0
// token_project backward, eqs. (3) to (6) of docs/derivations/token_project.md.
//
// Work split: token_project_backward takes kRows pixels of one image, computes P again and f, writes them to the
// workspace [B, N, T], and the gradient of the queries; row_sums computes the gradients of keys and tokens.
// Memory: queries are read once, grad_output twice, or once if only tokens need a gradient.
// Numerics: P and f are rounded to the type of x before the products, as in torch. No atomics: parts are added in a
// fixed order.
#pragma once

#include "common/row_sums.cuh"
#include "token_project/forward.cuh"

namespace vitkern {

// The kernel's results for row_sums, [B, N, T] in the type of x; null if not needed.
struct TokenProjectLeft {
  void *shares, *f;
};

// Eq. (4) for the caller's row: turns `h` into f.
template <int kRows, typename A>
__device__ __forceinline__ void gradients_of_logits(const A* shares, A* h, int64_t tokens) {
  constexpr int kLanes = kLanesOfRow<kRows>;
  const int lane = threadIdx.x % kLanes;
  A mean = 0;
  for (int64_t t = lane; t < tokens; t += kLanes) mean += shares[t] * h[t];
  mean = team_reduce<kLanes>(mean, [](A one, A other) { return one + other; });
  for (int64_t t = lane; t < tokens; t += kLanes) h[t] = shares[t] * (h[t] - mean);
}

template <typename T, int kRows>
__global__ void __launch_bounds__(kBlockThreads, 2)
    token_project_backward(const __grid_constant__ TokenProjectParams p,
                           const __grid_constant__ TokenProjectLeft left) {
  using A = Accumulator<T>;
  constexpr int kVector = kVectorBytes / sizeof(T), kLanes = kLanesOfRow<kRows>;
  VITKERN_DYNAMIC_SHARED(unsigned char, bytes);
  const Stage<T, kRows> stage{bytes};
  const int stride = static_cast<int>(SharedRows<A>::stride_of(p.token_count));
  const SharedRows<A> shares{reinterpret_cast<A*>(bytes + stage.kBytes), stride};
  const SharedRows<A> h{shares.at + kRows * stride, stride};
  const SharedRows<T> f{reinterpret_cast<T*>(h.at + kRows * stride),
                        static_cast<int>(SharedRows<T>::stride_of(p.token_count))};
  const ProjectPlace place = project_place<kRows>(p);
  const Matrix<T> query = of_image<T>(p.query, place.image, p.pixels, p.keys);
  const Matrix<T> key = of_image<T>(p.key, place.image, p.token_count, p.keys);
  const int row = threadIdx.x / kLanes;
  const int64_t pixel = place.first + row, first_left = (place.image * p.pixels + pixel) * p.token_count;

  by_token(query, key, place.first, stage, shares);
  softmax_row<kRows>(shares.at + row * stride, p.token_count);
  if (left.f || p.grad_query) {
    by_token(of_image<T>(p.grad_output, place.image, p.pixels, p.channels),
             of_image<T>(p.tokens, place.image, p.token_count, p.channels), place.first, stage, h);
    gradients_of_logits<kRows>(shares.at + row * stride, h.at + row * stride, p.token_count);
  }
  for (int t = threadIdx.x % kLanes; t < f.stride; t += kLanes) {
    const bool exists = t < p.token_count && pixel < p.pixels;
    f.at[row * f.stride + t] = narrow<T>(exists ? h.at[row * stride + t] : A{0});
    if (exists && left.shares)
      static_cast<T*>(left.shares)[first_left + t] = narrow<T>(shares.at[row * stride + t]);
    if (exists && left.f) static_cast<T*>(left.f)[first_left + t] = f.at[row * f.stride + t];
  }
  if (!p.grad_query) return;

  T* grad_query = static_cast<T*>(p.grad_query) + place.image * p.pixels * p.keys;
  const bool vectors = query.vectors && aligned(grad_query);
  for (int64_t number = 0; number < p.keys; number += kColumns) {
    Sums<A> sums[BlockTile<kRows>::kTiles] = {};
    block_product(f.factor(), Streamed<T, true>{key, number}, p.token_count, stage, sums);
    for_rows<kRows, T>(sums, stage, [&](int row, int column, A(&grad)[kVector]) {
      if (place.first + row < p.pixels)
        store_part(grad_query + (place.first + row) * p.keys, number + column, p.keys, vectors, grad);
    });
  }
}

}  // namespace vitkern
