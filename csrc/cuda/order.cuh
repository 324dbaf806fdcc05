// float32 numbers as unsigned keys of the same order.
#pragma once

#include "vector.cuh"

namespace qt {

// -0 and +0 get one key; a NaN must not come here.
QT_FUNCTION uint32_t ascending_key(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

QT_FUNCTION float from_ascending_key(uint32_t key) {
  return bit_cast<float>(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// Products, sums and quotients that are rounded by themselves: the compiler may not fuse these.
#ifdef __CUDA_ARCH__
QT_FUNCTION float rounded_sum(float x, float y) { return __fadd_rn(x, y); }
QT_FUNCTION float rounded_quotient(float x, float y) { return __fdiv_rn(x, y); }
#else
QT_FUNCTION float rounded_sum(float x, float y) { return x + y; }
QT_FUNCTION float rounded_quotient(float x, float y) { return x / y; }
#endif

}  // namespace qt
