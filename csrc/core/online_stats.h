// The numerical core shared by every native kernel, CPU and GPU (docs/method.md, "Per token").
//
// A row of logits z is folded into (m, S, T) with m = max z, S = Σ e^(z-m), T = Σ (z-m) e^(z-m). The identity is
// m = -inf, S = T = 0. T is the shifted sum: the unshifted one cancels for large common offsets.
// Plain functions of scalars: no torch, no containers, usable from device code.
#pragma once

#include <math.h>
#include <stdint.h>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define QT_HOST_DEVICE __host__ __device__ __attribute__((always_inline))
#elif defined(__GNUC__)
#define QT_HOST_DEVICE __attribute__((always_inline))
#else
#define QT_HOST_DEVICE
#endif

namespace qt {

// Everything is `static`: the CPU kernels are compiled once per instruction set, and an inline function with
// external linkage would let the linker keep the copy of the wrong one.
#define QT_FUNCTION QT_HOST_DEVICE static inline

template <typename R>
struct OnlineStats {
  R max;       // m
  R sum;       // S
  R weighted;  // T
};

template <typename R>
QT_FUNCTION OnlineStats<R> empty_stats() {
  return {R(-INFINITY), R(0), R(0)};
}

// Moves (m, S, T) to a new maximum M >= m.
template <typename R>
QT_FUNCTION OnlineStats<R> rebase(OnlineStats<R> row, R new_max) {
  if (row.max == new_max || row.max == R(-INFINITY)) return {new_max, row.sum, row.weighted};
  const R shift = row.max - new_max;
  const R factor = exp(shift);
  return {new_max, row.sum * factor, (row.weighted + shift * row.sum) * factor};
}

// The statistics of two parts of one row taken together. Deterministic, not associative in floating point: merge
// in a fixed order.
template <typename R>
QT_FUNCTION OnlineStats<R> merge(OnlineStats<R> a, OnlineStats<R> b) {
  const R top = b.max > a.max ? b.max : a.max;
  const OnlineStats<R> left = rebase(a, top);
  const OnlineStats<R> right = rebase(b, top);
  return {top, left.sum + right.sum, left.weighted + right.weighted};
}

template <typename R>
struct TokenStats {
  R nll;
  R entropy;
  R row_max;
  R log_sum;
};

// nll = log S - (z_y - m), entropy = log S - T/S. NaN for a row that has no finite logit.
template <typename R>
QT_FUNCTION TokenStats<R> finish(OnlineStats<R> row, R label_logit) {
  const R log_sum = row.sum > R(0) ? R(log(row.sum)) : R(NAN);
  return {log_sum - (label_logit - row.max), log_sum - row.weighted / row.sum, row.max, log_sum};
}

// Everything that the gradient of one row needs besides its logits. lse alone would not do: its rounding error
// at a large common offset is an error of p.
template <typename R>
struct RowGradient {
  R row_max;
  R log_sum;
  R entropy;
  R grad_p;        // g_nll + g_lse
  R grad_entropy;  // g_entropy
  R grad_nll;      // g_nll, subtracted at the label
};

// (g_nll + g_lse) p - g_entropy p (log p + entropy), for log p = (z - m) - log S and p = e^(log p).
// `floor` bounds log p where p is 0, so that 0·(-inf) does not become NaN.
template <bool HAS_ENTROPY, typename R>
QT_FUNCTION R gradient_of_z(R log_p, R p, R floor, const RowGradient<R>& row) {
  if (!HAS_ENTROPY) return row.grad_p * p;
  const R bounded = log_p < floor ? floor : log_p;
  return p * (row.grad_p - row.grad_entropy * (bounded + row.entropy));
}

// z = softcap·tanh(logit_scale·x / softcap), or logit_scale·x
template <typename R>
struct Scaling {
  R logit_scale;
  R softcap;  // 0: none
};

// dz/dx from z
template <bool HAS_SOFTCAP, typename R>
QT_FUNCTION R scaling_slope(R z, const Scaling<R>& scaling) {
  if (!HAS_SOFTCAP) return scaling.logit_scale;
  const R ratio = z / scaling.softcap;
  return scaling.logit_scale * (R(1) - ratio * ratio);
}

// In base 2, as the GPU kernels work: its exponential unit is binary, and t = z·log2 e - r is one fused multiply-add.
//
// max holds a reference r, in bits, that is close to the row's maximum and need not be exactly it; S = Σ 2^t and
// T = Σ t 2^t are relative to it. The identity is r = reference_floor(), finite so that r - r is never NaN, and not
// near the largest float, which times log2 e would overflow.

template <typename R>
struct Log2 {
  static constexpr R e = R(1.4426950408889634);
  static constexpr R nats = R(0.6931471805599453);  // per bit
};

// 2^t is 0 from here on, and t·0 is not NaN
template <typename R>
QT_FUNCTION R no_bits() {
  return R(-1e4);
}

template <typename R>
QT_FUNCTION OnlineStats<R> empty_bits() {
  return {R(-1e30), R(0), R(0)};
}

QT_FUNCTION float exp2_of(float t) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(t));
  return result;
#else
  return exp2f(t);
#endif
}
QT_FUNCTION double exp2_of(double t) { return exp2(t); }

template <typename R>
QT_FUNCTION OnlineStats<R> merge_bits(OnlineStats<R> a, OnlineStats<R> b) {
  const R top = a.max > b.max ? a.max : b.max;
  const R shift_a = a.max - top, shift_b = b.max - top;
  const R factor_a = exp2_of(shift_a), factor_b = exp2_of(shift_b);
  return {top, a.sum * factor_a + b.sum * factor_b,
          (a.weighted + shift_a * a.sum) * factor_a + (b.weighted + shift_b * b.sum) * factor_b};
}

// `label_bits` is t at the label. log_sum is relative to row_max as rounded, so that both together lose nothing.
template <typename R>
QT_FUNCTION TokenStats<R> finish_bits(OnlineStats<R> row, R label_bits) {
  const R bits = row.sum == R(0) ? R(NAN) : R(log2(row.sum));
  const R row_max = bits == bits ? row.max * Log2<R>::nats : R(NAN);
  return {(bits - label_bits) * Log2<R>::nats, (bits - row.weighted / row.sum) * Log2<R>::nats, row_max,
          (bits - R(fma(row_max, Log2<R>::e, -row.max))) * Log2<R>::nats};
}

// What one element's gradient takes: p·(a + b·t) for t = z·log2 e - reference and p = 2^t.
template <typename R>
struct GradientBits {
  R reference;
  R a;
  R b;
};

#ifdef __CUDA_ARCH__
QT_FUNCTION float rounded_product(float x, float y) { return __fmul_rn(x, y); }
QT_FUNCTION double rounded_product(double x, double y) { return __dmul_rn(x, y); }
#else
QT_FUNCTION float rounded_product(float x, float y) { return x * y; }
QT_FUNCTION double rounded_product(double x, double y) { return x * y; }
#endif

// A large common offset leaves the reference a rounding error, a factor of the whole row. The error is known, and
// goes into a and b. `slope` is dz/dx without the softcap's part.
template <typename R>
QT_FUNCTION GradientBits<R> gradient_bits_of(const RowGradient<R>& row, R slope) {
  const R high = rounded_product(row.row_max, Log2<R>::e), low = rounded_product(row.log_sum, Log2<R>::e);
  const R reference = high + low;
  const R part = reference - high;
  const R excess = -((high - (reference - part)) + (low - part) + R(fma(row.row_max, Log2<R>::e, -high)));
  const R factor = R(exp2(excess)) * slope;
  const R b = -row.grad_entropy * Log2<R>::nats;
  const R a = row.grad_p - row.grad_entropy * row.entropy;
  return {reference, (a + b * excess) * factor, b * factor};
}

template <bool HAS_ENTROPY, typename R>
QT_FUNCTION R gradient_of_bits(R t, const GradientBits<R>& row) {
  const R p = exp2_of(t);
  if (!HAS_ENTROPY) return p * row.a;
  const R bounded = t < no_bits<R>() ? no_bits<R>() : t;
  return p * R(fma(bounded, row.b, row.a));
}

}  // namespace qt
