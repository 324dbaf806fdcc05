// The language-model head in chunks: logits exist only in a fixed workspace.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <array>
#include <functional>
#include <vector>

#include "operators.h"
#include "rows.h"

namespace qt {

struct Head {
  Head(const Tensor& hidden, const Tensor& weight, const OptTensor& bias, const Scaling<double>& scaling);

  Tensor hidden, weight, bias;
  Scaling<double> scaling;
  DType dtype;
  int64_t size, vocabulary, element;
  const c10::OperatorHandle* onednn;  // the product for this dtype, if it is not ATen's
};

// Called with a row's place in `rows`, its folded (m, S, T) and its label's logit.
using OnStats = std::function<void(int64_t, const OnlineStats<double>&, double)>;

// Folds the logits of `rows`; 2·rows·H·V flops, one tile of logits at a time.
void head_stats(const Head& head, const Labels& labels, const std::vector<int64_t>& rows, const OnStats& on_stats);

// Gives the upstream of one row; where `fold` is set, from the statistics of its logits.
using RowUpstream = std::function<RowGradient<double>(int64_t, const OnlineStats<double>&, double)>;

// Gradients of hidden, weight and bias over `rows`; 2·rows·H·V flops for the logits and for each of the first two,
// and again for the logits where the weight's gradient takes a pass of its own.
Tensors3 head_gradient(const Head& head, const Labels& labels, const std::vector<int64_t>& rows, bool fold,
                       const RowUpstream& upstream, std::array<bool, 3> needs);

}  // namespace qt
