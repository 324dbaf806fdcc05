// The schemas of the row operators, as SCHEMAS of qtuning_kernels/kernels/dispatch.py has them.
#pragma once

#define QT_SCALING "int ignore_index, float logit_scale, float? softcap"
#define QT_STATS "Tensor entropy, Tensor row_max, Tensor log_sum"
#define QT_UPSTREAM "Tensor? grad_nll, Tensor? grad_entropy, Tensor? grad_lse"

namespace qt {

constexpr const char* kTokenStats =
    "token_stats(Tensor logits, Tensor labels, " QT_SCALING ") -> (Tensor, Tensor, Tensor, Tensor)";
constexpr const char* kTokenStatsBackward =
    "token_stats_backward(Tensor logits, Tensor labels, " QT_STATS ", " QT_UPSTREAM ", " QT_SCALING ") -> Tensor";
constexpr const char* kTokenStatsBackwardInplace =
    "token_stats_backward_(Tensor(a!) logits, Tensor labels, " QT_STATS ", " QT_UPSTREAM ", " QT_SCALING ") -> ()";

}  // namespace qt
