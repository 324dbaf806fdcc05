// The numerical core shared by every native kernel, CPU and GPU (docs/method.md, "Per token").
//
// A row of logits z is folded into (m, S, T) with m = max z, S = Σ e^(z-m), T = Σ (z-m) e^(z-m). The identity is
// m = -inf, S = T = 0. T is the shifted sum: the unshifted one cancels for large common offsets.
// Plain functions of scalars: no torch, no containers, usable from device code.
#pragma once

#include <math.h>
#include <stdint.h>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define QT_HOST_DEVICE __host__ __device__ __forceinline__
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

}  // namespace qt
