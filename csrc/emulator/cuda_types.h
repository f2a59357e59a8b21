// SPDX-License-Identifier: Apache-2.0
// The types of CUDA's headers that the kernels use, for a compiler that has none of them. Always used
// by the emulator, toolkit or not, so that there is one path. The 16-bit types hold bits and convert as
// the hardware does.
#pragma once

#include <cstdint>
#include <cstring>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

inline unsigned __float_as_uint(float number) {
  unsigned bits;
  std::memcpy(&bits, &number, sizeof bits);
  return bits;
}

inline float __uint_as_float(unsigned bits) {
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

inline float __half2float(__half half) {
  const unsigned sign = (half.bits & 0x8000u) << 16, magnitude = half.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // The exponents' biases differ by 112; a multiplication moves them, and makes subnormals normal.
  return __uint_as_float(sign | magnitude << 13) * 0x1p112f;
}

inline __half __float2half_rn(float number) {
  const unsigned sign = __float_as_uint(number) >> 16 & 0x8000u;
  unsigned magnitude = __float_as_uint(number) & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    magnitude = 0x7fffu;  // not a number
  } else if (magnitude >= 0x477ff000u) {
    magnitude = 0x7c00u;  // from 65520 on, infinity
  } else if (magnitude < 0x38800000u) {
    // Subnormal: the last bit of 0.5f is worth as much as theirs, so the addition rounds at the right place.
    magnitude = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - __float_as_uint(0.5f);
  } else {
    magnitude = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | magnitude)};
}

inline float __bfloat162float(__nv_bfloat16 number) { return __uint_as_float(unsigned{number.bits} << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float number) {
  const unsigned bits = __float_as_uint(number);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
