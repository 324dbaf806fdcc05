// The operators of qtuning_kernels/ops.py for CPU tensors; signatures and shapes as there.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace qt {

using at::Tensor;
using OptTensor = std::optional<at::Tensor>;
using OptDouble = std::optional<double>;
using Tensors3 = std::tuple<Tensor, Tensor, Tensor>;
using Tensors4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Tensors6 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Tensors4 token_stats(const Tensor& logits, const Tensor& labels, int64_t ignore_index, double logit_scale,
                     OptDouble softcap);
Tensor token_stats_backward(const Tensor& logits, const Tensor& labels, const Tensor& entropy, const Tensor& row_max,
                            const Tensor& log_sum, const OptTensor& grad_nll, const OptTensor& grad_entropy,
                            const OptTensor& grad_lse, int64_t ignore_index, double logit_scale, OptDouble softcap);
void token_stats_backward_(const Tensor& logits, const Tensor& labels, const Tensor& entropy, const Tensor& row_max,
                           const Tensor& log_sum, const OptTensor& grad_nll, const OptTensor& grad_entropy,
                           const OptTensor& grad_lse, int64_t ignore_index, double logit_scale, OptDouble softcap);

Tensors4 linear_token_stats(const Tensor& hidden, const Tensor& weight, const OptTensor& bias, const Tensor& labels,
                            int64_t ignore_index, double logit_scale, OptDouble softcap);
Tensors3 linear_token_stats_backward(const Tensor& hidden, const Tensor& weight, const OptTensor& bias,
                                     const Tensor& labels, const Tensor& entropy, const Tensor& row_max,
                                     const Tensor& log_sum, const OptTensor& grad_nll, const OptTensor& grad_entropy,
                                     const OptTensor& grad_lse, int64_t ignore_index, double logit_scale,
                                     OptDouble softcap, std::array<bool, 3> needs);
Tensors4 linear_cross_entropy(const Tensor& hidden, const Tensor& weight, const OptTensor& bias, const Tensor& labels,
                              const OptTensor& token_weight, int64_t ignore_index, double logit_scale,
                              OptDouble softcap, std::array<bool, 3> needs);

// What cpu_layers.py puts in the place of scaled_dot_product_attention; query [B, heads, L, D], key and value
// [B, key heads, L, D], as is the result.
Tensor causal_attention(const Tensor& query, const Tensor& key, const Tensor& value, double scale);
Tensors3 causal_attention_backward(const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value,
                                   double scale);

Tensor segment_means(const Tensor& values, const Tensor& cu_seqlens);
Tensors6 triage_rank(const Tensor& ppl, const Tensor& entropy, int64_t k);
Tensor select_tokens(const Tensor& ppl, const Tensor& cu_seqlens, const Tensor& num_keep, double neighbor_weight,
                     bool keep_high, bool neighbor_mean);

}  // namespace qt
