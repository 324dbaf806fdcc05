// The pruning policy on vectors of length B and T, bit for bit as qtuning_kernels/reference_policy.py defines it.
// Scores are compared exactly, so no multiplication may be fused with an addition.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "operators.h"

namespace qt {
namespace {

constexpr int64_t kAlphaMaxPercent = 49;  // the bisection's upper end, α ≤ 0.49

std::vector<int64_t> boundaries(const Tensor& cu_seqlens, int64_t total) {
  TORCH_CHECK_VALUE(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, "cu_seqlens has shape ", cu_seqlens.sizes(),
                    "; accepted: [B+1]");
  const Tensor wide = cu_seqlens.to(at::kLong).contiguous();
  const int64_t* data = wide.const_data_ptr<int64_t>();
  std::vector<int64_t> result(data, data + wide.numel());
  for (size_t i = 0; i < result.size(); ++i) {
    const bool ordered = result[i] >= (i ? result[i - 1] : 0) && result[i] <= total;
    TORCH_CHECK_VALUE(ordered, "cu_seqlens[", i, "] is ", result[i], "; accepted: non-decreasing from 0 to ", total);
  }
  return result;
}

// The keys of one axis (see reference_policy.triage_rank): `never` where α ≤ 0.49 excludes the sample.
struct Axis {
  std::vector<int64_t> high, low;
  std::vector<float> normalised;  // min–max over the eligible samples

  Axis(const float* x, const std::vector<char>& eligible, int64_t never)
      : high(eligible.size(), never), low(eligible.size(), never), normalised(eligible.size(), 0.0f) {
    std::vector<float> ascending;
    for (size_t i = 0; i < eligible.size(); ++i)
      if (eligible[i]) ascending.push_back(x[i]);
    if (ascending.empty()) return;
    std::sort(ascending.begin(), ascending.end());
    const int64_t count = static_cast<int64_t>(ascending.size());
    const float lowest = ascending.front(), span = ascending.back() - lowest;
    for (size_t i = 0; i < eligible.size(); ++i) {
      if (!eligible[i]) continue;
      const auto [first, last] = std::equal_range(ascending.begin(), ascending.end(), x[i]);
      const int64_t higher = ascending.end() - last, lower = first - ascending.begin();
      if (100 * higher <= kAlphaMaxPercent * count) high[i] = 2 * higher;
      if (lower < higher && (100 * lower < kAlphaMaxPercent * count || lower == 0)) low[i] = 2 * lower + 1;
      if (span > 0) normalised[i] = (x[i] - lowest) / span;
    }
  }
};

}  // namespace

Tensor segment_means(const Tensor& values, const Tensor& cu_seqlens) {
  TORCH_CHECK_VALUE(values.dim() == 2, "values has shape ", values.sizes(), "; accepted: [C, T]");
  const auto bounds = boundaries(cu_seqlens, values.size(1));
  const int64_t segments = static_cast<int64_t>(bounds.size()) - 1, size = values.size(1);
  const Tensor wide = values.to(at::kDouble).contiguous();
  const Tensor means = at::empty({values.size(0), segments}, values.options().dtype(at::kFloat));
  const double* from = wide.const_data_ptr<double>();
  float* to = means.mutable_data_ptr<float>();
  at::parallel_for(0, values.size(0) * segments, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = bounds[i % segments], last = bounds[i % segments + 1];
      const double* row = from + i / segments * size;
      const double sum = std::accumulate(row + first, row + last, 0.0);
      to[i] = static_cast<float>(sum / static_cast<double>(last - first));
    }
  });
  return means;
}

Tensors6 triage_rank(const Tensor& ppl, const Tensor& entropy, int64_t k) {
  const int64_t size = ppl.numel();
  TORCH_CHECK_VALUE(ppl.dim() == 1 && entropy.sizes() == ppl.sizes() && size >= 1, "ppl has shape ", ppl.sizes(),
                    " and entropy ", entropy.sizes(), "; accepted: [B] both, B >= 1");
  TORCH_CHECK_VALUE(k >= 1 && k <= size, "k is ", k, "; accepted: 1 to ", size);
  const Tensor x = ppl.to(at::kFloat).contiguous(), y = entropy.to(at::kFloat).contiguous();
  const float* ppl_data = x.const_data_ptr<float>();
  const float* entropy_data = y.const_data_ptr<float>();
  std::vector<char> eligible(size);
  for (int64_t i = 0; i < size; ++i) eligible[i] = std::isfinite(ppl_data[i]) && std::isfinite(entropy_data[i]);
  const int64_t count = std::count(eligible.begin(), eligible.end(), 1);
  const int64_t never = 2 * size + 2;
  const Axis error(ppl_data, eligible, never), uncertainty(entropy_data, eligible, never);

  std::vector<int64_t> key(size), sort_key(size), order(size);
  std::vector<int8_t> corner(size);
  std::vector<float> score(size);
  for (int64_t i = 0; i < size; ++i) {
    const int64_t q2 = std::max(error.high[i], uncertainty.low[i]);
    const int64_t q4 = std::max(error.low[i], uncertainty.high[i]);
    key[i] = std::min(q2, q4);
    sort_key[i] = eligible[i] ? key[i] : never + 1;
    score[i] = std::fabs(error.normalised[i] - uncertainty.normalised[i]);
    if (std::isnan(score[i])) score[i] = INFINITY;  // an axis whose span overflows
    corner[i] = q2 < q4 || (q2 == q4 && error.normalised[i] > uncertainty.normalised[i]) ? 2 : 4;
  }
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return sort_key[a] != sort_key[b] ? sort_key[a] < sort_key[b] : score[a] > score[b];
  });

  const auto options = ppl.options();
  const Tensor quadrant = at::empty({size}, options.dtype(at::kChar));
  const Tensor role = at::zeros({size}, options.dtype(at::kChar));
  const Tensor keep = at::zeros({size}, options.dtype(at::kBool));
  const Tensor kept_index = at::empty({k}, options.dtype(at::kLong));
  const Tensor supplemented = at::zeros({size}, options.dtype(at::kBool));
  const Tensor alpha = at::empty({}, options.dtype(at::kFloat));
  int64_t* kept = kept_index.mutable_data_ptr<int64_t>();
  for (int64_t rank = 0; rank < k; ++rank) {
    const int64_t i = order[rank];
    kept[rank] = eligible[i] ? i : size;
    if (!eligible[i]) continue;
    keep.mutable_data_ptr<bool>()[i] = true;
    role.mutable_data_ptr<int8_t>()[i] = corner[i];
    supplemented.mutable_data_ptr<bool>()[i] = key[i] == never;
  }
  std::sort(kept, kept + k);

  const int64_t last_key = 2 * (kAlphaMaxPercent * count / 100) + 1;
  const int64_t kth_key = sort_key[order[k - 1]];
  const int64_t kappa = std::min(kth_key, last_key);
  for (int64_t i = 0; i < size; ++i) {
    const bool noise = error.high[i] <= kappa && uncertainty.high[i] <= kappa;
    const bool redundant = error.low[i] <= kappa && uncertainty.low[i] <= kappa;
    quadrant.mutable_data_ptr<int8_t>()[i] = key[i] <= kappa ? corner[i] : noise ? 1 : redundant ? 3 : 0;
  }
  const float alpha_max = 0.49f;
  *alpha.mutable_data_ptr<float>() =
      kth_key > last_key ? alpha_max
                         : std::min(static_cast<float>(kappa) / static_cast<float>(2 * count), alpha_max);
  return {quadrant, role, keep, kept_index, supplemented, alpha};
}

Tensor select_tokens(const Tensor& ppl, const Tensor& cu_seqlens, const Tensor& num_keep, double neighbor_weight,
                     bool keep_high, bool neighbor_mean) {
  TORCH_CHECK_VALUE(ppl.dim() == 1, "ppl has shape ", ppl.sizes(), "; accepted: [T]");
  const auto bounds = boundaries(cu_seqlens, ppl.numel());
  const int64_t segments = static_cast<int64_t>(bounds.size()) - 1;
  TORCH_CHECK_VALUE(num_keep.dim() == 1 && num_keep.size(0) == segments, "num_keep has shape ", num_keep.sizes(),
                    "; accepted: [", segments, "]");
  const Tensor x = ppl.to(at::kFloat).contiguous(), wanted = num_keep.to(at::kLong).contiguous();
  const float* p = x.const_data_ptr<float>();
  const int64_t* keep_counts = wanted.const_data_ptr<int64_t>();
  const Tensor mask = at::zeros(ppl.sizes(), ppl.options().dtype(at::kBool));
  bool* chosen = mask.mutable_data_ptr<bool>();
  const float own = static_cast<float>(1.0 - neighbor_weight), weight = static_cast<float>(neighbor_weight);
  at::parallel_for(0, segments, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> score;
    std::vector<int64_t> order;
    for (int64_t segment = begin; segment < end; ++segment) {
      const int64_t start = bounds[segment], length = bounds[segment + 1] - start;
      const int64_t count = std::clamp<int64_t>(keep_counts[segment], 0, length);
      score.resize(length);
      order.resize(length);
      for (int64_t i = 0; i < length; ++i) {
        const float here = p[start + i];
        const float before = i > 0 ? p[start + i - 1] : here;
        const float after = i + 1 < length ? p[start + i + 1] : here;
        const float both = before + after;
        const float around = neighbor_mean ? both * 0.5f : both;
        const float value = here * own + around * weight;
        score[i] = std::isnan(value) ? INFINITY : value;
        order[i] = i;
      }
      // the count best under a total order: score, then position
      const auto better = [&](int64_t a, int64_t b) {
        if (score[a] != score[b]) return keep_high ? score[a] > score[b] : score[a] < score[b];
        return a < b;
      };
      std::nth_element(order.begin(), order.begin() + count, order.end(), better);
      for (int64_t i = 0; i < count; ++i) chosen[start + order[i]] = true;
    }
  });
  return mask;
}

}  // namespace qt
