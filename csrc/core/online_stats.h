// The numerical core shared by the CPU and the CUDA kernels (docs/method.md, "Per token"), in base 2: exponential units
// are binary. Scalars only: no torch, no containers, usable from device code.
//
// For logits z of a row, t = z·log2 e - r, relative to a reference r that is close to their maximum and need not be
// exactly it. S = Σ 2^t and T = Σ t 2^t. T is the shifted sum: the unshifted one cancels for large common offsets.
#pragma once

#include "function.h"

namespace qt {

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
struct OnlineStats {
  R row_max;  // r, in bits
  R sum_exp;  // S
  R sum_shifted_exp;  // T
};

// The identity. Its reference is finite so that r - r is never NaN, and not near the lowest float, which times log2 e
// would overflow.
template <typename R>
QT_FUNCTION OnlineStats<R> empty_stats() {
  return {sizeof(R) == 4 ? R(-1e30) : R(-1e300), R(0), R(0)};
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

// The larger one, or NaN if there is one: a row's reference tells a NaN from a +inf, which S and T do not.
QT_FUNCTION float max_nan(float a, float b) {
#ifdef __CUDA_ARCH__
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return a > b || a != a ? a : b;
#endif
}
QT_FUNCTION double max_nan(double a, double b) { return a > b || a != a ? a : b; }

// The statistics of two parts of one row taken together. Deterministic, not associative in floating point: merge
// in a fixed order.
template <typename R>
QT_FUNCTION OnlineStats<R> merge(OnlineStats<R> a, OnlineStats<R> b) {
  const R top = max_nan(a.row_max, b.row_max);
  const R shift_a = a.row_max - top, shift_b = b.row_max - top;
  const R factor_a = exp2_of(shift_a), factor_b = exp2_of(shift_b);
  return {top, a.sum_exp * factor_a + b.sum_exp * factor_b,
          (a.sum_shifted_exp + shift_a * a.sum_exp) * factor_a + (b.sum_shifted_exp + shift_b * b.sum_exp) * factor_b};
}

// In nats.
template <typename R>
struct TokenStats {
  R nll;
  R entropy;
  R row_max;
  R log_sum;
};

// `label_bits` is t at the label. log_sum is relative to row_max as rounded to Out, so that both together lose nothing.
// What rounding leaves below 0 is 0. Without a finite maximum row_max is that maximum and log_sum 0, as in PyTorch's
// logsumexp, and nll and entropy are NaN.
template <typename Out, typename R>
QT_FUNCTION TokenStats<Out> finalize(OnlineStats<R> row, R label_bits) {
  const R top = row.sum_exp == R(0) ? R(-INFINITY) : row.row_max;
  if (!(top - top == R(0))) return {Out(NAN), Out(NAN), Out(top), top == top ? Out(0) : Out(NAN)};
  const R bits = R(log2(row.sum_exp));
  const R nll = (bits - label_bits) * Log2<R>::nats;
  const R entropy = (bits - row.sum_shifted_exp / row.sum_exp) * Log2<R>::nats;
  const Out row_max = Out(row.row_max * Log2<R>::nats);
  const R log_sum = (bits - R(fma(R(row_max), Log2<R>::e, -row.row_max))) * Log2<R>::nats;
  return {Out(nll < R(0) ? R(0) : nll), Out(entropy < R(0) ? R(0) : entropy), row_max, Out(log_sum)};
}

// Everything that the gradient of one row needs besides its logits. lse alone would not do: its rounding error
// at a large common offset is an error of p.
template <typename R>
struct RowGradient {
  R row_max;
  R log_sum;
  R entropy;
  R grad_p;  // g_nll + g_lse
  R grad_entropy;  // g_entropy
  R grad_nll;  // g_nll, subtracted at the label
};

// What the gradient of one element takes: p·(a + b·t) for t = z·log2 e - reference and p = 2^t, which is
// (g_nll + g_lse) p - g_entropy p (log p + entropy).
template <typename R>
struct GradientBits {
  R reference;
  R a;
  R b;
};

// `excess` is what rounding has added to the reference: the known error of a factor of the whole row, which goes into
// a and b. `slope` is dz/dx without the softcap's part.
template <typename R>
QT_FUNCTION GradientBits<R> gradient_bits_of(R reference, R excess, const RowGradient<R>& row, R slope) {
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

// z = softcap·tanh(logit_scale·x / softcap), or logit_scale·x
template <typename R>
struct Scaling {
  R logit_scale;
  R softcap;  // 0: none
};

// z per unit of the scaled value, which is ±x, or the tanh; never negative, so that both have their maximum together.
QT_FUNCTION double factor_of(const Scaling<double>& scaling) {
  return scaling.softcap != 0 ? scaling.softcap : fabs(scaling.logit_scale);
}

// tanh's argument per unit of x, in two parts: a common factor of all logits would show in the entropy.
template <typename R>
struct SoftcapRatio {
  explicit SoftcapRatio(const Scaling<double>& scaling) {
    const double exact = scaling.softcap != 0 ? scaling.logit_scale / scaling.softcap : 1;
    // towards 0, so that the rest has the same sign and is not 0: an infinite x then has both products infinite, not
    // NaN
    inner = nextafter(R(exact), R(0));
    rest = R(exact - double(inner));
  }
  R inner, rest;
};

}  // namespace qt
