// The element types of logits, and conversions to and from the type that is computed in.
#pragma once

#include "function.h"

namespace qt {

// 16-bit types by their bits: the toolkit's own headers are not needed, nor known to a host compiler
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <typename T>
struct RealOf {
  using type = float;
};
template <>
struct RealOf<double> {
  using type = double;
};
template <typename T>
using Real = typename RealOf<T>::type;

QT_FUNCTION float to_real(float x) { return x; }
QT_FUNCTION double to_real(double x) { return x; }
QT_FUNCTION float to_real(bfloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
QT_FUNCTION float to_real(float16 x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
#else
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  // 2^112 rebiases the exponent and normalises subnormals; inf and NaN keep their all-ones exponent
  const float scaled = bit_cast<float>(magnitude) * 5.192296858534828e33f;
  const uint32_t special = magnitude | 0x7f800000u;
  const uint32_t bits = magnitude >= 0x0f800000u ? special : bit_cast<uint32_t>(scaled);
  return bit_cast<float>(bits | (uint32_t(x.bits & 0x8000u) << 16));
#endif
}

// To nearest, ties to even; for the host, since a GPU has instructions for it. The second argument only names the type.
QT_FUNCTION float from_real(float x, float) { return x; }
QT_FUNCTION double from_real(double x, double) { return x; }
QT_FUNCTION bfloat16 from_real(float x, bfloat16) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {uint16_t(x == x ? rounded : 0x7fc0u)};
}
QT_FUNCTION float16 from_real(float x, float16) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // normal range: rebias and round the 13 dropped bits; a carry moves into the exponent, up to inf
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // below 2^-14: adding 0.5 lets the addition itself round to the subnormal grid
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return {uint16_t(half | sign)};
}

}  // namespace qt
