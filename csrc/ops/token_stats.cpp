// Statistics and gradient of logits that exist. Forward reads each active logit once; backward reads and writes each
// active one once, and only writes the zeros of the others.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include "../cpu/zero.h"
#include "operators.h"
#include "rows.h"

#include <memory>

namespace qt {
namespace {

// Rows [A, C, V] of any strides with a dense last dimension.
struct Rows {
  Rows(const Tensor& logits)
      : data(static_cast<char*>(logits.data_ptr())),
        inner(logits.size(1)),
        count(logits.size(0) * logits.size(1)),
        vocabulary(logits.size(2)),
        outer_stride(logits.stride(0)),
        inner_stride(logits.stride(1)),
        element(logits.element_size()) {}
  char* at(int64_t row, int64_t column) const {
    return data + (row / inner * outer_stride + row % inner * inner_stride + column) * element;
  }

  char* data;
  int64_t inner, count, vocabulary, outer_stride, inner_stride, element;
};

void check(const Tensor& logits) {
  TORCH_CHECK_VALUE(logits.dim() == 3 && logits.size(2) >= 1, "logits has shape ", logits.sizes(),
                    "; accepted: [A, C, V] with V >= 1");
  TORCH_CHECK_VALUE(logits.stride(2) == 1 || logits.size(2) == 1, "logits has stride ", logits.stride(2),
                    " along the vocabulary; accepted: 1");
}

void backward_into(const Tensor& out, const Tensor& logits, const Tensor& labels_tensor, const Upstream& upstream,
                   int64_t ignore_index, const Scaling<double>& scaling) {
  const DType dtype = dtype_of(logits, "logits");
  const Rows from(logits), to(out);
  const Labels labels(labels_tensor, from.count, from.vocabulary, ignore_index);
  const int64_t chunks = chunks_of(from.vocabulary);
  std::vector<int64_t> order(from.count);  // active rows from the front, inactive ones from the back
  int64_t active = 0, inactive_from = from.count;
  for (int64_t i = 0; i < from.count; ++i) {
    if (!labels.ignored(i) && upstream.active(i))
      order[active++] = i;
    else
      order[--inactive_from] = i;
  }
  const int64_t length = std::min(kChunk, from.vocabulary);
  parallel_over(active * chunks, length, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      const int64_t row = order[item / chunks], start = item % chunks * kChunk;
      gradient_chunk(dtype, from.at(row, start), to.at(row, start), start,
                     std::min(kChunk, from.vocabulary - start), labels[row], labels.in_range(row), scaling,
                     upstream.row(row));
    }
  });
  const int64_t row_bytes = to.vocabulary * to.element;
  const bool streaming = (from.count - active) * row_bytes >= kStreamFrom;
  parallel_over(from.count - active, from.vocabulary, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) zero(to.at(order[active + i], 0), row_bytes, streaming);
  });
}

}  // namespace

Tensors4 token_stats(const Tensor& logits, const Tensor& labels_tensor, int64_t ignore_index, double logit_scale,
                     OptDouble softcap) {
  at::AutoDispatchBelowADInplaceOrView guard;
  check(logits);
  const DType dtype = dtype_of(logits, "logits");
  const Scaling<double> scaling = scaling_of(logit_scale, softcap);
  const Rows rows(logits);
  const Labels labels(labels_tensor, rows.count, rows.vocabulary, ignore_index);
  StatsOutputs outputs(logits, labels_tensor.sizes());
  const int64_t chunks = chunks_of(rows.vocabulary);
  std::vector<int64_t> order(rows.count);
  const std::unique_ptr<OnlineStats<double>[]> parts(new OnlineStats<double>[rows.count * chunks]);
  int64_t active = 0;
  for (int64_t i = 0; i < rows.count; ++i)
    if (!labels.ignored(i)) order[active++] = i;

  const Kernels& k = kernels();
  parallel_over(active * chunks, std::min(kChunk, rows.vocabulary), [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      const int64_t start = item % chunks * kChunk;
      parts[item] = k.chunk_stats(dtype, rows.at(order[item / chunks], start),
                           std::min(kChunk, rows.vocabulary - start), scaling);
    }
  });
  parallel_over(active, 256, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      OnlineStats<double> stats = parts[i * chunks];
      for (int64_t p = 1; p < chunks; ++p) stats = merge(stats, parts[i * chunks + p]);
      const int64_t row = order[i];
      double label_bits = NAN;
      if (labels.in_range(row)) {
        const double value = k.scaled_value(dtype, rows.at(row, labels[row]), scaling);
        label_bits = value * factor_of(scaling) * Log2<double>::e - stats.row_max;
      }
      outputs.store(row, stats, label_bits);
    }
  });
  return outputs.tuple();
}

Tensor token_stats_backward(const Tensor& logits, const Tensor& labels, const Tensor& entropy, const Tensor& row_max,
                            const Tensor& log_sum, const OptTensor& grad_nll, const OptTensor& grad_entropy,
                            const OptTensor& grad_lse, int64_t ignore_index, double logit_scale, OptDouble softcap) {
  at::AutoDispatchBelowADInplaceOrView guard;
  check(logits);
  const Upstream upstream(entropy, row_max, log_sum, grad_nll, grad_entropy, grad_lse, labels.numel());
  const Tensor out = at::empty(logits.sizes(), logits.options());
  backward_into(out, logits, labels, upstream, ignore_index, scaling_of(logit_scale, softcap));
  return out;
}

void token_stats_backward_(const Tensor& logits, const Tensor& labels, const Tensor& entropy, const Tensor& row_max,
                           const Tensor& log_sum, const OptTensor& grad_nll, const OptTensor& grad_entropy,
                           const OptTensor& grad_lse, int64_t ignore_index, double logit_scale, OptDouble softcap) {
  at::AutoDispatchBelowADInplaceOrView guard;
  check(logits);
  const Upstream upstream(entropy, row_max, log_sum, grad_nll, grad_entropy, grad_lse, labels.numel());
  backward_into(logits, logits, labels, upstream, ignore_index, scaling_of(logit_scale, softcap));
}

}  // namespace qt
