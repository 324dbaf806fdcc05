// Folding vectors of logits into a thread's own partial row (r, S, T); see "In base 2" of ../core/online_stats.h.
#pragma once

#include "scaling.cuh"

namespace qt {

// Folds 2N values whose maximum is `top`. One exponential per value, and one for all that was folded before. BOUNDED: no
// value is -inf, so that t·2^t needs no care.
template <int N, bool BOUNDED, typename F>
QT_FUNCTION void fold_pairs(OnlineStats<float>& row, float top, float unit, F value) {
  const float r = fmaxf(row.max, top * unit);
  const float shift = row.max - r;
  const float factor = exp2_of(shift);
  const float before = fmaf(shift, row.sum, row.weighted) * factor;
  const Pair units = {unit, unit}, reference = {-r, -r};
  Pair sum, weighted;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const Pair t = fma_pair(value(i), units, reference);
    const Pair e = {exp2_of(t.x), exp2_of(t.y)};
    const Pair bounded = BOUNDED ? t : Pair{fmaxf(t.x, no_bits<float>()), fmaxf(t.y, no_bits<float>())};
    sum = i ? add_pair(sum, e) : Pair{fmaf(row.sum, factor, e.x), e.y};
    weighted = i ? fma_pair(bounded, e, weighted) : Pair{fmaf(bounded.x, e.x, before), bounded.y * e.y};
  }
  row = {r, sum.x + sum.y, weighted.x + weighted.y};
}

template <typename R>
QT_FUNCTION void fold_one(OnlineStats<R>& row, R value, R unit) {
  const R z = value * unit;
  const R r = row.max > z ? row.max : z != z ? row.max : z;
  const R shift = row.max - r, factor = exp2_of(shift);
  const R t = R(fma(value, unit, -r)), e = exp2_of(t);
  const R bounded = t < no_bits<R>() ? no_bits<R>() : t;
  row = {r, row.sum * factor + e, (row.weighted + shift * row.sum) * factor + bounded * e};
}

// bfloat16 and float16 without a softcap: two elements per instruction until the multiply-add.
template <Form FORM, int N, typename T>
QT_FUNCTION void fold_packed(OnlineStats<float>& row, const uint4 (&vectors)[N], const Units<float>& units) {
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
    if (BOUNDED) words[i] = max_pair_nan(words[i], units.floor, bfloat16{});
  }
  uint32_t highest = words[0];
#pragma unroll
  for (int i = 1; i < 4 * N; ++i) highest = max_pair(highest, words[i], T{});
  const Pair top = unpack(highest, T{});
  fold_pairs<4 * N, BOUNDED>(row, fmaxf(top.x, top.y), units.unit, [&](int i) { return unpack(words[i], T{}); });
}

template <Form FORM, int N, typename T>
QT_FUNCTION void fold(OnlineStats<typename Real<T>::type>& row, const uint4 (&vectors)[N],
                      const Units<typename Real<T>::type>& units) {
  if constexpr (sizeof(T) == 8) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const uint4 v = vectors[n];
      fold_one(row, scaled<FORM>(bit_cast<double>(uint64_t(v.y) << 32 | v.x), units), units.unit);
      fold_one(row, scaled<FORM>(bit_cast<double>(uint64_t(v.w) << 32 | v.z), units), units.unit);
    }
  } else if constexpr (sizeof(T) == 2 && FORM != Form::SOFTCAP) {
    fold_packed<FORM, N, T>(row, vectors, units);
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
        values[n * pairs + i] = {scaled<FORM>(x.x, units), scaled<FORM>(x.y, units)};
      }
    }
    float top = fmaxf(values[0].x, values[0].y);
#pragma unroll
    for (int i = 1; i < N * pairs; ++i) top = fmaxf(top, fmaxf(values[i].x, values[i].y));
    fold_pairs<N * pairs, false>(row, top, units.unit, [&](int i) { return values[i]; });
  }
}

}  // namespace qt
