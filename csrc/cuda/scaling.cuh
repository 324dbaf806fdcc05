// How raw logits become t = z·log2 e: the compile-time variants, and the factors that each needs.
#pragma once

#include "qtuning_cuda.h"
#include "vector.cuh"

namespace qt {

enum class Form {
  LINEAR,   // z = logit_scale·x, logit_scale >= 0: all of it is in the factor, at no cost per element
  NEGATED,  // logit_scale < 0: the maximum of z is the minimum of x, so x is folded with its sign turned
  SOFTCAP,  // z = softcap·tanh(logit_scale·x / softcap)
};

template <typename R>
struct Units {
  R unit;          // bits per unit of the scaled value
  R inner;         // tanh's argument per unit of x,
  R inner_rest;    // and what its rounding leaves: a common factor of all logits shows in the entropy
  R slope;         // dz/dx, up to the softcap's 1 - tanh²
  uint32_t floor;  // two bfloat16: a number in place of -inf, whose multiple by `unit` is finite
};

inline Form form_of(qt_scaling s) {
  return s.softcap != 0 ? Form::SOFTCAP : s.logit_scale < 0 ? Form::NEGATED : Form::LINEAR;
}

template <typename R>
Units<R> units_of(qt_scaling s) {
  const double log2e = 1.4426950408889634;
  const Form form = form_of(s);
  const double factor = form == Form::SOFTCAP ? s.softcap : form == Form::NEGATED ? -s.logit_scale : s.logit_scale;
  const double unit = factor * log2e;
  const uint32_t floor = bit_cast<uint32_t>(float(unit > 1 ? -2e38 / unit : -2e38)) & 0xffff0000u;
  const double inner = form == Form::SOFTCAP ? s.logit_scale / s.softcap : 1;
  return {R(unit), R(inner), R(inner - double(R(inner))), R(s.logit_scale), floor | floor >> 16};
}

QT_FUNCTION float tanh_of(float x) { return tanhf(x); }
QT_FUNCTION double tanh_of(double x) { return tanh(x); }

// the value whose multiple by `unit` is z·log2 e
template <Form FORM, typename R>
QT_FUNCTION R scaled(R x, const Units<R>& units) {
  if (FORM == Form::SOFTCAP) return tanh_of(R(fma(x, units.inner, x * units.inner_rest)));
  return FORM == Form::NEGATED ? -x : x;
}

}  // namespace qt
