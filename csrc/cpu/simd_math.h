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

// exact - a·b with one rounding, where the two are nearly equal.
QT_FUNCTION float minus_product(float exact, float a, float b) {
#ifdef QT_FMA
  return __builtin_fmaf(-a, b, exact);
#else  // in parts whose products are exact
  const float a_high = bit_cast<float>(bit_cast<uint32_t>(a) & 0xfffff000u);
  const float b_high = bit_cast<float>(bit_cast<uint32_t>(b) & 0xfffff000u);
  return ((exact - a_high * b_high) - a_high * (b - b_high)) - (a - a_high) * b;
#endif
}

// tanh x within 1 ULP: a softcap multiplies its error, so that one of 2 ULP shows beside PyTorch's.
//
// -tanh|x| = e/(2 + e) for e = e^(-2|x|) - 1 = 2^-n·part + (2^-n - 1), where part = e^(-2r) - 1, |r| <= ln 2 / 4. What
// rounding takes from part, e and the quotient is known, and added at the end. Bounds are those of whole numbers, whose
// minimum is one instruction: NaN is put back last.
QT_FUNCTION float vector_tanh(float x) {
  const int32_t magnitude = bit_cast<int32_t>(x) & 0x7fffffff;
  const int32_t most = 0x41120000;  // 9.125, whose tanh is 1
  const float bounded = bit_cast<float>(magnitude < most ? magnitude : most);
  const float magic = 12582912.0f;
  const int32_t most_n = 0x4b400018;  // magic + 24: beyond, 2^-n - 1 would be rounded
  const int32_t n_bits = bit_cast<int32_t>(bounded * 2.885390082f + magic);
  const int32_t shifted = n_bits < most_n ? n_bits : most_n;
  const float n = bit_cast<float>(shifted) - magic;
  const float r = (bounded - n * 0.3466796875f) + n * 1.060972200e-4f;  // ln 2 / 2 in two parts, the first one short
  float p = 8.927180843e-02f;
  p = p * r - 2.677727188e-01f;
  p = p * r + 6.666600222e-01f;
  p = p * r - 1.333322649f;
  p = p * r + 2.000000028f;
  const float curved = p * (r * r);
  const float twice = r + r;
  const float part = curved - twice;
  const float part_rest = curved - (part + twice);
  const float scale = bit_cast<float>(0x3f800000u - (uint32_t(shifted) << 23));
  const float offset = scale - 1.0f;
  const float e = part * scale + offset;
  const float e_rest = (part * scale + (offset - e)) + part_rest * scale;
  const float quotient = e / (e + 2.0f);
  const float slope = 1.0f - quotient;  // 2/(2 + e)
  const float rest = minus_product(e - 2.0f * quotient, quotient, e) + e_rest * slope;
  const float result = rest * (0.5f * slope) + quotient;
  const uint32_t bits = (bit_cast<uint32_t>(result) & 0x7fffffffu) | (bit_cast<uint32_t>(x) & 0x80000000u);
  return x == x ? bit_cast<float>(bits) : x;
}

}  // namespace qt
