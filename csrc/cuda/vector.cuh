// One 128-bit access worth of logits: unpacking to float32, packing back, packed maxima, and arithmetic on pairs.
//
// Device code uses what the architecture has; the other branch says the same in plain C++, for the host build.
#pragma once

#include <cuda_runtime.h>

#include "../core/element.h"
#include "../core/online_stats.h"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define QT_PAIRED_FLOAT32 1  // two float32 operations in one instruction
#else
#define QT_PAIRED_FLOAT32 0
#endif

namespace qt {

struct Pair {
  float x, y;
};

QT_FUNCTION Pair fma_pair(Pair a, Pair b, Pair c) {
#if QT_PAIRED_FLOAT32
  unsigned long long result;
  asm("fma.rn.f32x2 %0, %1, %2, %3;"
      : "=l"(result)
      : "l"(bit_cast<unsigned long long>(a)), "l"(bit_cast<unsigned long long>(b)),
        "l"(bit_cast<unsigned long long>(c)));
  return bit_cast<Pair>(result);
#else
  return {fmaf(a.x, b.x, c.x), fmaf(a.y, b.y, c.y)};
#endif
}

QT_FUNCTION Pair add_pair(Pair a, Pair b) {
#if QT_PAIRED_FLOAT32
  unsigned long long result;
  asm("add.rn.f32x2 %0, %1, %2;"
      : "=l"(result)
      : "l"(bit_cast<unsigned long long>(a)), "l"(bit_cast<unsigned long long>(b)));
  return bit_cast<Pair>(result);
#else
  return {a.x + b.x, a.y + b.y};
#endif
}

QT_FUNCTION Pair mul_pair(Pair a, Pair b) {
#if QT_PAIRED_FLOAT32
  unsigned long long result;
  asm("mul.rn.f32x2 %0, %1, %2;"
      : "=l"(result)
      : "l"(bit_cast<unsigned long long>(a)), "l"(bit_cast<unsigned long long>(b)));
  return bit_cast<Pair>(result);
#else
  return {a.x * b.x, a.y * b.y};
#endif
}

// bfloat16 is the upper half of a float32
QT_FUNCTION Pair unpack(uint32_t word, bfloat16) {
  return {bit_cast<float>(word << 16), bit_cast<float>(word & 0xffff0000u)};
}
QT_FUNCTION Pair unpack(uint32_t word, float16) {
  return {to_real(float16{uint16_t(word)}), to_real(float16{uint16_t(word >> 16)})};
}

// rounded to nearest even
QT_FUNCTION uint32_t pack(Pair pair, bfloat16) {
#ifdef __CUDA_ARCH__
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(pair.y), "f"(pair.x));
  return word;
#else
  return from_real(pair.x, bfloat16{}).bits | uint32_t(from_real(pair.y, bfloat16{}).bits) << 16;
#endif
}
QT_FUNCTION uint32_t pack(Pair pair, float16) {
#ifdef __CUDA_ARCH__
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(pair.y), "f"(pair.x));
  return word;
#else
  return from_real(pair.x, float16{}).bits | uint32_t(from_real(pair.y, float16{}).bits) << 16;
#endif
}

QT_FUNCTION void store(bfloat16* to, float x) { to->bits = uint16_t(pack(Pair{x, 0}, bfloat16{})); }
QT_FUNCTION void store(float16* to, float x) { to->bits = uint16_t(pack(Pair{x, 0}, float16{})); }
QT_FUNCTION void store(float* to, float x) { *to = x; }
QT_FUNCTION void store(double* to, double x) { *to = x; }

template <typename T>
constexpr bool kIsBfloat16 = false;
template <>
constexpr bool kIsBfloat16<bfloat16> = true;

// The larger ones of both halves, each NaN if one of its two is.
template <typename T>
QT_FUNCTION uint32_t max_pair(uint32_t a, uint32_t b, T type) {
#ifdef __CUDA_ARCH__
  uint32_t word;
  if constexpr (kIsBfloat16<T>)
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
  else
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
  return word;
#else
  const Pair x = unpack(a, type), y = unpack(b, type);
  return pack(Pair{max_nan(x.x, y.x), max_nan(x.y, y.y)}, type);
#endif
}

// elements in 16 bytes
template <typename T>
constexpr int kWidth = 16 / sizeof(T);

QT_FUNCTION void to_words(uint4 v, uint32_t (&words)[4]) {
  words[0] = v.x;
  words[1] = v.y;
  words[2] = v.z;
  words[3] = v.w;
}

// The 16 bytes at `from`, which need not be aligned, from the two aligned vectors that hold them. `from` must not be
// aligned: the second vector would then lie behind the bytes asked for.
QT_FUNCTION uint4 load_unaligned(const void* from) {
  const unsigned shift = unsigned(reinterpret_cast<uintptr_t>(from) & 15);
  // by subtraction: a pointer made of an integer would be read as a generic address
  const uint4* aligned = reinterpret_cast<const uint4*>(static_cast<const char*>(from) - shift);
  uint32_t w[8];
  const uint4 low = aligned[0], high = aligned[1];
  w[0] = low.x, w[1] = low.y, w[2] = low.z, w[3] = low.w, w[4] = high.x, w[5] = high.y, w[6] = high.z, w[7] = high.w;
  if (shift & 8)
    for (int i = 0; i < 6; ++i) w[i] = w[i + 2];
  if (shift & 4)
    for (int i = 0; i < 5; ++i) w[i] = w[i + 1];
  const unsigned bits = (shift & 3) * 8;
  auto funnel = [bits](uint32_t first, uint32_t second) { return uint32_t((uint64_t(second) << 32 | first) >> bits); };
  return uint4{funnel(w[0], w[1]), funnel(w[1], w[2]), funnel(w[2], w[3]), funnel(w[3], w[4])};
}

}  // namespace qt
