// Branch-free scalar functions that compilers turn into vector code of any width.
#pragma once

#include <stdint.h>
#include <string.h>

#include "../core/online_stats.h"

namespace qt {

template <typename To, typename From>
QT_FUNCTION To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

constexpr float kExpUnderflow = -87.33654f;  // below: the result would be subnormal, and is 0
constexpr float kExpOverflow = 88.72283f;    // above: inf

// What the caller knows about the argument, or needs of the result.
enum class Domain {
  any,
  non_positive,  // cannot exceed rounding errors above 0: no overflow
  sum,           // as well, for a sum of at least 1: subnormal results are 2^-126, and e^NaN may be any number
};

// e^x within 1.1 ULP (1.5 ULP without FMA) over the whole range of float; subnormal results are 0, NaN stays NaN.
// Cody-Waite reduction to [-ln2/2, ln2/2] and a polynomial of degree 6, whose coefficients minimise the largest
// relative error there, 3.1e-9; 2^n is added to the exponent.
template <Domain DOMAIN>
QT_FUNCTION float vector_exp(float x) {
  const float magic = 12582912.0f;  // 1.5·2^23: adding it rounds to an integer in the low mantissa bits
  float clamped = x < kExpUnderflow ? kExpUnderflow : x;
  if (DOMAIN == Domain::any) clamped = clamped > kExpOverflow ? kExpOverflow : clamped;
  const float shifted = clamped * 1.44269504f + magic;
  const float n = shifted - magic;
  float r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float q = 1.381446700510e-3f;
  q = q * r + 8.368780461629e-3f;
  q = q * r + 4.166839421604e-2f;
  q = q * r + 1.666652010741e-1f;
  q = q * r + 4.999999341247e-1f;
  q = q * r + 1.0f;
  const float power = q * r + 1.0f;
  const uint32_t exponent = bit_cast<uint32_t>(shifted) << 23;
  float result = bit_cast<float>(bit_cast<uint32_t>(power) + exponent);
  if (DOMAIN == Domain::sum) return result;
  result = x < kExpUnderflow ? 0.0f : result;
  if (DOMAIN == Domain::any) result = x > kExpOverflow ? INFINITY : result;
  return x == x ? result : x;
}

// tanh x: Cephes' polynomial near 0, where 1 - e^(-2|x|) would cancel, else 1 - 2e/(1 + e).
QT_FUNCTION float vector_tanh(float x) {
  const float magnitude = bit_cast<float>(bit_cast<uint32_t>(x) & 0x7fffffffu);
  const float square = x * x;
  float q = -5.70498872745e-3f;
  q = q * square + 2.06390887954e-2f;
  q = q * square - 5.37397155531e-2f;
  q = q * square + 1.33314422036e-1f;
  q = q * square - 3.33332819422e-1f;
  const float near_zero = q * square * x + x;
  const float e = vector_exp<Domain::non_positive>(-2.0f * magnitude);
  const float far = 1.0f - 2.0f * e / (1.0f + e);  // one rounding near 1, where (1 - e)/(1 + e) has three
  const float far_signed = bit_cast<float>(bit_cast<uint32_t>(far) | (bit_cast<uint32_t>(x) & 0x80000000u));
  return magnitude < 0.625f ? near_zero : far_signed;
}

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

QT_FUNCTION float to_real(float x) { return x; }
QT_FUNCTION double to_real(double x) { return x; }
QT_FUNCTION float to_real(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
QT_FUNCTION float to_real(f16 x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  // 2^112 rebiases the exponent and normalises subnormals; inf and NaN keep their all-ones exponent
  const float scaled = bit_cast<float>(magnitude) * 5.192296858534828e33f;
  const uint32_t special = magnitude | 0x7f800000u;
  const uint32_t bits = magnitude >= 0x0f800000u ? special : bit_cast<uint32_t>(scaled);
  return bit_cast<float>(bits | (uint32_t(x.bits & 0x8000u) << 16));
}

// The second argument only names the type.
QT_FUNCTION float from_real(float x, float) { return x; }
QT_FUNCTION double from_real(double x, double) { return x; }
QT_FUNCTION bf16 from_real(float x, bf16) {  // to nearest, ties to even
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {uint16_t(x == x ? rounded : 0x7fc0u)};
}
QT_FUNCTION f16 from_real(float x, f16) {  // to nearest, ties to even
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
