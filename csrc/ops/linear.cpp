// The operators on hidden states.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>

#include <algorithm>

#include "head.h"

namespace qt {
namespace {

template <typename F>
std::vector<int64_t> select_rows(int64_t count, const F& live) {
  std::vector<int64_t> rows;
  rows.reserve(count);
  for (int64_t i = 0; i < count; ++i)
    if (live(i)) rows.push_back(i);
  return rows;
}

}  // namespace

Tensors4 linear_token_stats(const Tensor& hidden, const Tensor& weight, const OptTensor& bias,
                            const Tensor& labels_tensor, int64_t ignore_index, double logit_scale,
                            OptDouble softcap) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const Head head(hidden, weight, bias, scaling_of(logit_scale, softcap));
  const Labels labels(labels_tensor, hidden.size(0), head.vocabulary, ignore_index);
  const auto rows = select_rows(labels.count(), [&](int64_t i) { return !labels.ignored(i); });
  StatsOutputs outputs(hidden, labels_tensor.sizes());
  head_stats(head, labels, rows, [&](int64_t i, const OnlineStats<double>& stats, double label_logit) {
    outputs.store(rows[i], finish(stats, label_logit));
  });
  return outputs.tuple();
}

Tensors3 linear_token_stats_backward(const Tensor& hidden, const Tensor& weight, const OptTensor& bias,
                                     const Tensor& labels_tensor, const Tensor& entropy, const Tensor& row_max,
                                     const Tensor& log_sum, const OptTensor& grad_nll, const OptTensor& grad_entropy,
                                     const OptTensor& grad_lse, int64_t ignore_index, double logit_scale,
                                     OptDouble softcap, std::array<bool, 3> needs) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const Head head(hidden, weight, bias, scaling_of(logit_scale, softcap));
  const Labels labels(labels_tensor, hidden.size(0), head.vocabulary, ignore_index);
  const Upstream upstream(entropy, row_max, log_sum, grad_nll, grad_entropy, grad_lse, labels.count());
  const auto rows = select_rows(labels.count(), [&](int64_t i) { return !labels.ignored(i) && upstream.live(i); });
  return head_gradient(
      head, labels, rows, /*fold=*/false,
      [&](int64_t i, const OnlineStats<double>&, double) { return upstream.row(rows[i]); }, needs);
}

Tensors4 linear_cross_entropy(const Tensor& hidden, const Tensor& weight, const OptTensor& bias,
                              const Tensor& labels_tensor, const OptTensor& token_weight, int64_t ignore_index,
                              double logit_scale, OptDouble softcap, std::array<bool, 3> needs) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const Head head(hidden, weight, bias, scaling_of(logit_scale, softcap));
  const Labels labels(labels_tensor, hidden.size(0), head.vocabulary, ignore_index);
  const TokenValues weights(token_weight, labels.count(), "token_weight", 1);
  const auto rows = select_rows(labels.count(), [&](int64_t i) { return !labels.ignored(i) && weights[i] != 0; });

  double loss = 0;
  const auto add = [&](int64_t i, const OnlineStats<double>& stats, double label_logit) {
    const TokenStats<double> token = finish(stats, label_logit);
    const double weight_of_row = weights[rows[i]];
    loss += weight_of_row * token.nll;
    return RowGradient<double>{token.row_max, token.log_sum, 0, weight_of_row, 0, weight_of_row};
  };
  const bool any = std::any_of(needs.begin(), needs.end(), [](bool need) { return need; });
  Tensors3 gradients;
  if (any) {
    gradients = head_gradient(head, labels, rows, /*fold=*/true, add, needs);
  } else {
    head_stats(head, labels, rows, add);
    for (Tensor* gradient : {&std::get<0>(gradients), &std::get<1>(gradients), &std::get<2>(gradients)})
      *gradient = at::empty({0}, hidden.options());
  }
  const Tensor total = at::scalar_tensor(loss, hidden.options().dtype(stats_type(hidden)));
  return std::tuple_cat(std::make_tuple(total), gradients);
}

}  // namespace qt
