// How raw logits become t = z·log2 e: the compile-time forms, and the factors of each.
#pragma once

#include "qtuning_cuda.h"
#include "vector.cuh"

namespace qt {

enum class Form {
  LINEAR,   // z = logit_scale·x, logit_scale >= 0: all of it is in the factor, at no cost per element
  NEGATED,  // logit_scale < 0: the maximum of z is the minimum of x, so the sign of x is turned
  SOFTCAP,  // z = softcap·tanh(logit_scale·x / softcap)
};

template <typename R>
struct Factors {
  R unit;          // bits per unit of the scaled value
  SoftcapRatio<R> ratio;
  R slope;         // dz/dx, up to the softcap's 1 - tanh²
  uint32_t floor;  // two bfloat16: a number in place of -inf, whose multiple by `unit` is finite
};

inline Form form_of(qt_scaling s) {
  return s.softcap != 0 ? Form::SOFTCAP : s.logit_scale < 0 ? Form::NEGATED : Form::LINEAR;
}

template <typename R>
Factors<R> factors_of(qt_scaling s) {
  const Scaling<double> scaling = {s.logit_scale, s.softcap};
  const double unit = factor_of(scaling) * Log2<double>::e;
  const uint32_t floor = bit_cast<uint32_t>(float(unit > 1 ? -2e38 / unit : -2e38)) & 0xffff0000u;
  return {R(unit), SoftcapRatio<R>(scaling), R(s.logit_scale), floor | floor >> 16};
}

QT_FUNCTION float tanh_of(float x) { return tanhf(x); }
QT_FUNCTION double tanh_of(double x) { return tanh(x); }

// the value whose multiple by `unit` is z·log2 e
template <Form FORM, typename R>
QT_FUNCTION R scaled(R x, const Factors<R>& factors) {
  if (FORM == Form::SOFTCAP) return tanh_of(R(fma(x, factors.ratio.inner, x * factors.ratio.rest)));
  return FORM == Form::NEGATED ? -x : x;
}

}  // namespace qt
