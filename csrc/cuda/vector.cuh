// One 128-bit access worth of logits: unpacking to float32, packing back, packed maxima, and arithmetic on pairs.
//
// Device code uses what the architecture has; the other branch says the same in plain C++, for the host build.
#pragma once

#include <cuda_runtime.h>
#include <string.h>

#include "../core/online_stats.h"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define QT_PAIRED_FLOAT32 1  // two float32 operations in one instruction
#else
#define QT_PAIRED_FLOAT32 0
#endif

namespace qt {

// 16-bit types by their bits: the toolkit's own headers are not needed, nor known to a host compiler
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <typename To, typename From>
QT_FUNCTION To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

struct Pair {
  float x, y;
};

QT_FUNCTION Pair fma_pair(Pair a, Pair b, Pair c) {
#if QT_PAIRED_FLOAT32
  unsigned long long result;
  asm("fma.rn.f32x2 %0, %1, %2, %3;"
      : "=l"(result)
      : "l"(bit_cast<unsigned long long>(a)), "l"(bit_cast<unsigned long long>(b)), "l"(bit_cast<unsigned long long>(c)));
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
QT_FUNCTION float to_real(bfloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
QT_FUNCTION Pair unpack(uint32_t word, bfloat16) {
  return {bit_cast<float>(word << 16), bit_cast<float>(word & 0xffff0000u)};
}

QT_FUNCTION float to_real(float16 x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
#else
  return float(bit_cast<_Float16>(x.bits));
#endif
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
  auto round = [](float x) -> uint32_t {
    const uint32_t bits = bit_cast<uint32_t>(x);
    return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  };
  return round(pair.x) | round(pair.y) << 16;
#endif
}
QT_FUNCTION uint32_t pack(Pair pair, float16) {
#ifdef __CUDA_ARCH__
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(pair.y), "f"(pair.x));
  return word;
#else
  return bit_cast<uint16_t>(_Float16(pair.x)) | uint32_t(bit_cast<uint16_t>(_Float16(pair.y))) << 16;
#endif
}

QT_FUNCTION float to_real(float x) { return x; }
QT_FUNCTION double to_real(double x) { return x; }
QT_FUNCTION void store(bfloat16* to, float x) { to->bits = uint16_t(pack(Pair{x, 0}, bfloat16{})); }
QT_FUNCTION void store(float16* to, float x) { to->bits = uint16_t(pack(Pair{x, 0}, float16{})); }
QT_FUNCTION void store(float* to, float x) { *to = x; }
QT_FUNCTION void store(double* to, double x) { *to = x; }

// Both halves at once. A NaN loses against a number in max_pair and wins in max_pair_nan.
QT_FUNCTION uint32_t max_pair(uint32_t a, uint32_t b, bfloat16) {
#ifdef __CUDA_ARCH__
  uint32_t word;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
  return word;
#else
  const Pair x = unpack(a, bfloat16{}), y = unpack(b, bfloat16{});
  return pack(Pair{fmaxf(x.x, y.x), fmaxf(x.y, y.y)}, bfloat16{});
#endif
}
QT_FUNCTION uint32_t max_pair(uint32_t a, uint32_t b, float16) {
#ifdef __CUDA_ARCH__
  uint32_t word;
  asm("max.f16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
  return word;
#else
  const Pair x = unpack(a, float16{}), y = unpack(b, float16{});
  return pack(Pair{fmaxf(x.x, y.x), fmaxf(x.y, y.y)}, float16{});
#endif
}
QT_FUNCTION uint32_t max_pair_nan(uint32_t a, uint32_t b, bfloat16) {
#ifdef __CUDA_ARCH__
  uint32_t word;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
  return word;
#else
  const Pair x = unpack(a, bfloat16{}), y = unpack(b, bfloat16{});
  auto larger = [](float p, float q) { return p != p ? p : q != q ? q : fmaxf(p, q); };
  return pack(Pair{larger(x.x, y.x), larger(x.y, y.y)}, bfloat16{});
#endif
}

template <typename T>
constexpr bool kIsBfloat16 = false;
template <>
constexpr bool kIsBfloat16<bfloat16> = true;

template <typename T>
struct Real {
  using type = float;
};
template <>
struct Real<double> {
  using type = double;
};

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
  auto funnel = [bits](uint32_t first, uint32_t second) {
    return uint32_t((uint64_t(second) << 32 | first) >> bits);
  };
  return uint4{funnel(w[0], w[1]), funnel(w[1], w[2]), funnel(w[2], w[3]), funnel(w[3], w[4])};
}

}  // namespace qt
