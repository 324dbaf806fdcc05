// Branch-free scalar functions that compilers turn into vector code of any width.
#pragma once

#include "../core/function.h"

namespace qt {

constexpr float kLeastBits = -126.0f;  // 2^t is subnormal below, and taken to be 0

// 2^t for t in [-126, 128), within 1 ULP (1.2 ULP without FMA). t = n + f exactly, with an integer n and |f| <= 1/2; a
// polynomial of degree 6, whose coefficients minimise the largest relative error there, 2e-9; 2^n is added to the
// exponent.
QT_FUNCTION float exp2_in_range(float t) {
  const float magic = 12582912.0f;  // 1.5·2^23: adding it rounds to an integer in the low mantissa bits
  const float shifted = t + magic;
  const float f = t - (shifted - magic);
  float q = 1.535336206e-4f;
  q = q * f + 1.339887456e-3f;
  q = q * f + 9.618437358e-3f;
  q = q * f + 5.550332471e-2f;
  q = q * f + 2.402264791e-1f;
  q = q * f + 6.931472029e-1f;
  const float power = q * f + 1.0f;
  return bit_cast<float>(bit_cast<uint32_t>(power) + (bit_cast<uint32_t>(shifted) << 23));
}

// tanh x within 1 ULP: a softcap multiplies its error, so that one of 2 ULP shows beside PyTorch's.
//
// Near 0, where 1 - e would cancel for e = e^(-2|x|), an odd polynomial; else 1 - 2e/(1 + e). There the rounding errors
// of e, of 1 + e and of the last difference are known, and their effect is added at the end.
QT_FUNCTION float vector_tanh(float x) {
  const float magnitude = bit_cast<float>(bit_cast<uint32_t>(x) & 0x7fffffffu);
  const float square = x * x;
  float q = -5.696621513e-3f;
  q = q * square + 2.063188913e-2f;
  q = q * square - 5.373760505e-2f;
  q = q * square + 1.333141818e-1f;
  q = q * square - 3.333328111e-1f;
  const float near_zero = q * square * x + x;

  // e^(-2|x|) = 2^-n·e^(-2r) with |r| <= ln 2 / 4; ln 2 / 2 is taken in two parts, the first one short
  const float magic = 12582912.0f;
  const float bounded = magnitude > 20.0f ? 20.0f : magnitude;
  const float shifted = bounded * 2.885390082f + magic;
  const float n = shifted - magic;
  const float r = (bounded - n * 0.3466796875f) + n * 1.060972200e-4f;
  float p = 8.859899157e-2f;
  p = p * r - 2.679746582e-1f;
  p = p * r + 6.666880889e-1f;
  p = p * r - 1.333314453f;
  p = p * r + 1.999999767f;
  p = p * r - 2.0f;
  const float part = p * r;
  const float power = part + 1.0f;
  const float scale = bit_cast<float>(0x3f800000u - (bit_cast<uint32_t>(shifted) << 23));
  const float e = power * scale;
  const float e_rest = (part - (power - 1.0f)) * scale;
  const float sum = 1.0f + e;
  const float sum_rest = e - (sum - 1.0f);
  const float ratio = e / sum;
  const float ratio_rest = (e_rest * (1.0f - ratio) - ratio * sum_rest) * (1.0f - ratio);
  const float twice = 2.0f * ratio;
  const float difference = 1.0f - twice;
  const float far = difference + (((1.0f - difference) - twice) - 2.0f * ratio_rest);
  const float far_signed = bit_cast<float>(bit_cast<uint32_t>(far) | (bit_cast<uint32_t>(x) & 0x80000000u));
  return magnitude < 0.625f ? near_zero : far_signed;
}

}  // namespace qt
