// The row operators of qtuning_kernels/kernels/contract.py for CPU tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace qt {

using at::Tensor;
using OptTensor = std::optional<at::Tensor>;
using OptDouble = std::optional<double>;
using Tensors4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Tensors4 token_stats(const Tensor& logits, const Tensor& labels, int64_t ignore_index, double logit_scale,
                     OptDouble softcap);
Tensor token_stats_backward(const Tensor& logits, const Tensor& labels, const Tensor& entropy, const Tensor& row_max,
                            const Tensor& log_sum, const OptTensor& grad_nll, const OptTensor& grad_entropy,
                            const OptTensor& grad_lse, int64_t ignore_index, double logit_scale, OptDouble softcap);
void token_stats_backward_(const Tensor& logits, const Tensor& labels, const Tensor& entropy, const Tensor& row_max,
                           const Tensor& log_sum, const OptTensor& grad_nll, const OptTensor& grad_entropy,
                           const OptTensor& grad_lse, int64_t ignore_index, double logit_scale, OptDouble softcap);

}  // namespace qt
