// Adding vectors of logits to a thread's own partial row (r, S, T); see ../core/online_stats.h.
#pragma once

#include "scaling.cuh"

namespace qt {

// Adds 2N values whose maximum is `top`. One exponential per value, and one for all that was added before. BOUNDED: no
// value is -inf, so that t·2^t needs no care. A NaN becomes the reference, and a +inf does; the sums are NaN with
// either.
template <int N, bool BOUNDED, typename F>
QT_FUNCTION void update_pairs(OnlineStats<float>& row, float top, float unit, F value) {
  const float r = max_nan(row.row_max, top * unit);
  const float shift = row.row_max - r;
  const float factor = exp2_of(shift);
  const float before = fmaf(shift, row.sum_exp, row.sum_shifted_exp) * factor;
  const Pair bits = {unit, unit}, reference = {-r, -r};
  Pair sum_exp, sum_shifted_exp;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const Pair t = fma_pair(value(i), bits, reference);
    const Pair e = {exp2_of(t.x), exp2_of(t.y)};
    const Pair bounded = BOUNDED ? t : Pair{fmaxf(t.x, no_bits<float>()), fmaxf(t.y, no_bits<float>())};
    sum_exp = i ? add_pair(sum_exp, e) : Pair{fmaf(row.sum_exp, factor, e.x), e.y};
    sum_shifted_exp = i ? fma_pair(bounded, e, sum_shifted_exp) : Pair{fmaf(bounded.x, e.x, before), bounded.y * e.y};
  }
  row = {r, sum_exp.x + sum_exp.y, sum_shifted_exp.x + sum_shifted_exp.y};
}

template <typename R>
QT_FUNCTION void update_one(OnlineStats<R>& row, R value, R unit) {
  const R z = value * unit;
  const R r = max_nan(row.row_max, z);
  const R shift = row.row_max - r, factor = exp2_of(shift);
  const R t = R(fma(value, unit, -r)), e = exp2_of(t);
  const R bounded = t < no_bits<R>() ? no_bits<R>() : t;
  row = {r, row.sum_exp * factor + e, (row.sum_shifted_exp + shift * row.sum_exp) * factor + bounded * e};
}

// bfloat16 and float16 without a softcap: two elements per instruction until the multiply-add.
template <Form FORM, int N, typename T>
QT_FUNCTION void update_packed(OnlineStats<float>& row, const uint4 (&vectors)[N], const Factors<float>& factors) {
  constexpr bool BOUNDED = kIsBfloat16<T>;
  uint32_t words[4 * N];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    words[4 * n] = vectors[n].x, words[4 * n + 1] = vectors[n].y;
    words[4 * n + 2] = vectors[n].z, words[4 * n + 3] = vectors[n].w;
  }
#pragma unroll
  for (int i = 0; i < 4 * N; ++i) {
    if (FORM == Form::NEGATED) words[i] ^= 0x80008000u;
    if (BOUNDED) words[i] = max_pair(words[i], factors.floor, bfloat16{});
  }
  uint32_t highest = words[0];
#pragma unroll
  for (int i = 1; i < 4 * N; ++i) highest = max_pair(highest, words[i], T{});
  const Pair top = unpack(highest, T{});
  update_pairs<4 * N, BOUNDED>(row, max_nan(top.x, top.y), factors.unit, [&](int i) { return unpack(words[i], T{}); });
}

template <Form FORM, int N, typename T>
QT_FUNCTION void online_update(OnlineStats<Real<T>>& row, const uint4 (&vectors)[N], const Factors<Real<T>>& factors) {
  if constexpr (sizeof(T) == 8) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const uint4 v = vectors[n];
      update_one(row, scaled<FORM>(bit_cast<double>(uint64_t(v.y) << 32 | v.x), factors), factors.unit);
      update_one(row, scaled<FORM>(bit_cast<double>(uint64_t(v.w) << 32 | v.z), factors), factors.unit);
    }
  } else if constexpr (sizeof(T) == 2 && FORM != Form::SOFTCAP) {
    update_packed<FORM, N, T>(row, vectors, factors);
  } else {
    constexpr int pairs = sizeof(T) == 2 ? 4 : 2;
    Pair values[N * pairs];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      uint32_t words[4];
      to_words(vectors[n], words);
#pragma unroll
      for (int i = 0; i < pairs; ++i) {
        Pair x;
        if constexpr (sizeof(T) == 2)
          x = unpack(words[i], T{});
        else
          x = Pair{bit_cast<float>(words[2 * i]), bit_cast<float>(words[2 * i + 1])};
        values[n * pairs + i] = {scaled<FORM>(x.x, factors), scaled<FORM>(x.y, factors)};
      }
    }
    float top = max_nan(values[0].x, values[0].y);
#pragma unroll
    for (int i = 1; i < N * pairs; ++i) top = max_nan(top, max_nan(values[i].x, values[i].y));
    update_pairs<N * pairs, false>(row, top, factors.unit, [&](int i) { return values[i]; });
  }
}

}  // namespace qt
