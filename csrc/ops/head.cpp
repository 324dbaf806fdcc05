#include "head.h"

#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/Exception.h>

#include <string.h>

#include "workspace.h"

namespace qt {
namespace {

// A tile of logits stays in the last-level cache between the GEMM and the fold; larger ones gain no GEMM speed.
constexpr int64_t kTileRows = 1024;
constexpr int64_t kTileElements = int64_t(1) << 20;
// Whole rows of logits for a gradient: more rows per chunk mean fewer passes over the head's gradient.
constexpr int64_t kChunkBytes = int64_t(48) << 20;

Tensor wrap(void* data, int64_t rows, int64_t columns, const Tensor& like) {
  return at::from_blob(data, {rows, columns}, like.options().requires_grad(false));
}

bool consecutive(const std::vector<int64_t>& rows, int64_t first, int64_t count) {
  return rows[first + count - 1] - rows[first] == count - 1;
}

// Rows `rows[first .. first + count)` of hidden: a view where they are consecutive, else gathered into `buffer`.
Tensor gather(const Head& head, const std::vector<int64_t>& rows, int64_t first, int64_t count, void* buffer) {
  if (consecutive(rows, first, count)) return head.hidden.narrow(0, rows[first], count);
  const int64_t bytes = head.size * head.element;
  const char* from = static_cast<const char*>(head.hidden.const_data_ptr());
  for (int64_t i = 0; i < count; ++i)
    memcpy(static_cast<char*>(buffer) + i * bytes, from + rows[first + i] * bytes, bytes);
  return wrap(buffer, count, head.size, head.hidden);
}

int64_t even_chunk(int64_t total, int64_t limit) {
  const int64_t chunks = (total + limit - 1) / limit;
  return (total + chunks - 1) / chunks;
}

// Folds columns [start, start + n) of `count` rows of logits, `stride` apart, into `stats` and `label_logits`.
void fold_columns(const Head& head, const Labels& labels, const int64_t* rows, int64_t count, const void* logits,
                  int64_t stride, int64_t start, int64_t n, OnlineStats<double>* stats, double* label_logits) {
  const Kernels& k = kernels();
  parallel_units(count, n, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const char* x = static_cast<const char*>(logits) + i * stride * head.element;
      for (int64_t done = 0; done < n; done += kSegment) {
        const int64_t length = std::min(kSegment, n - done);
        stats[i] = merge(stats[i], k.fold(head.dtype, x + done * head.element, head.bias_at(start + done), length,
                                          head.scaling));
      }
      const int64_t label = labels[rows[i]];
      if (label >= start && label < start + n)
        label_logits[i] = k.logit(head.dtype, x + (label - start) * head.element, head.bias_at(label), head.scaling);
    }
  });
}

}  // namespace

Head::Head(const Tensor& h, const Tensor& w, const OptTensor& b, const Scaling<double>& s)
    : hidden(h.contiguous()), weight(w.contiguous()), scaling(s), dtype(dtype_of(h, "hidden")) {
  TORCH_CHECK_VALUE(h.dim() == 2 && w.dim() == 2 && h.size(1) == w.size(1) && w.size(0) >= 1, "hidden has shape ",
                    h.sizes(), " and weight ", w.sizes(), "; accepted: [N, H] and [V, H]");
  TORCH_CHECK_VALUE(w.scalar_type() == h.scalar_type() && w.device().is_cpu(), "weight is ", w.scalar_type(), " on ",
                    w.device(), "; accepted: as hidden, ", h.scalar_type(), " on cpu");
  if (b && b->defined()) {
    TORCH_CHECK_VALUE(b->dim() == 1 && b->size(0) == w.size(0) && b->device().is_cpu(), "bias has shape ", b->sizes(),
                      "; accepted: [", w.size(0), "] on cpu");
    bias = b->to(h.scalar_type()).contiguous();
  }
  size = h.size(1);
  vocabulary = w.size(0);
  element = h.element_size();
}

void head_stats(const Head& head, const Labels& labels, const std::vector<int64_t>& rows, const OnStats& on_stats) {
  const int64_t total = static_cast<int64_t>(rows.size());
  if (total == 0) return;
  const int64_t chunk = even_chunk(total, kTileRows);
  const int64_t width = std::min(head.vocabulary, std::max<int64_t>(1024, kTileElements / chunk));
  Workspace workspace(padded(chunk * width * head.element) + padded(chunk * head.size * head.element) +
                      padded(chunk * sizeof(OnlineStats<double>)) + padded(chunk * sizeof(double)));
  void* tile = workspace.take_bytes(chunk * width * head.element);
  void* gathered = workspace.take_bytes(chunk * head.size * head.element);
  auto* stats = workspace.take<OnlineStats<double>>(chunk);
  auto* label_logits = workspace.take<double>(chunk);
  for (int64_t first = 0; first < total; first += chunk) {
    const int64_t count = std::min(chunk, total - first);
    const Tensor hidden = gather(head, rows, first, count, gathered);
    std::fill_n(stats, count, empty_stats<double>());
    std::fill_n(label_logits, count, NAN);
    for (int64_t start = 0; start < head.vocabulary; start += width) {
      const int64_t n = std::min(width, head.vocabulary - start);
      Tensor logits = wrap(tile, count, n, head.hidden);
      at::cpu::mm_out(logits, hidden, head.weight.narrow(0, start, n).t());
      fold_columns(head, labels, rows.data() + first, count, tile, n, start, n, stats, label_logits);
    }
    for (int64_t i = 0; i < count; ++i) on_stats(first + i, stats[i], label_logits[i]);
  }
}

Tensors3 head_gradient(const Head& head, const Labels& labels, const std::vector<int64_t>& rows, bool fold,
                       const RowUpstream& upstream, std::array<bool, 3> needs) {
  const int64_t total = static_cast<int64_t>(rows.size());
  const Tensor none = at::empty({0}, head.hidden.options());
  const bool dense = total == head.hidden.size(0);
  Tensor grad_hidden = !needs[0] ? none : dense ? at::empty_like(head.hidden) : at::zeros_like(head.hidden);
  needs[2] = needs[2] && head.bias.defined();
  if (total == 0) {
    return {grad_hidden, needs[1] ? at::zeros_like(head.weight) : none, needs[2] ? at::zeros_like(head.bias) : none};
  }

  const int64_t limit = std::max<int64_t>(16, kChunkBytes / (head.vocabulary * head.element));
  const int64_t chunk = even_chunk(total, limit);
  const bool one_chunk = chunk == total;
  const bool low_precision = head.element == 2;
  const auto real = head.hidden.options().dtype(stats_type(head.hidden));
  Tensor grad_weight = needs[1] ? at::empty_like(head.weight) : none;
  // several chunks of a low-precision gradient are summed in float32, and rounded once
  const bool separate_sum = needs[1] && low_precision && !one_chunk;
  Tensor weight_sum = separate_sum ? at::zeros(head.weight.sizes(), real) : grad_weight;
  Tensor bias_sum = needs[2] ? at::zeros({head.vocabulary}, real) : none;

  const int64_t part_rows = std::min(head.vocabulary, std::max<int64_t>(1, kTileElements / head.size));
  Workspace workspace(padded(chunk * head.vocabulary * head.element) +
                      2 * padded(chunk * head.size * head.element) + padded(chunk * sizeof(OnlineStats<double>)) +
                      padded(chunk * sizeof(double)) + padded(chunk * sizeof(RowGradient<double>)) +
                      padded(separate_sum ? part_rows * head.size * head.element : 0));
  char* logits_data = static_cast<char*>(workspace.take_bytes(chunk * head.vocabulary * head.element));
  void* gathered = workspace.take_bytes(chunk * head.size * head.element);
  void* grad_gathered = workspace.take_bytes(chunk * head.size * head.element);
  auto* stats = workspace.take<OnlineStats<double>>(chunk);
  auto* label_logits = workspace.take<double>(chunk);
  auto* gradients = workspace.take<RowGradient<double>>(chunk);
  void* part = separate_sum ? workspace.take_bytes(part_rows * head.size * head.element) : nullptr;

  const Kernels& k = kernels();
  const int64_t pieces = pieces_of(head.vocabulary);
  for (int64_t first = 0; first < total; first += chunk) {
    const int64_t count = std::min(chunk, total - first);
    const Tensor hidden = gather(head, rows, first, count, gathered);
    Tensor logits = wrap(logits_data, count, head.vocabulary, head.hidden);
    at::cpu::mm_out(logits, hidden, head.weight.t());
    std::fill_n(stats, count, empty_stats<double>());
    std::fill_n(label_logits, count, NAN);
    if (fold)
      fold_columns(head, labels, rows.data() + first, count, logits_data, head.vocabulary, 0, head.vocabulary, stats,
                   label_logits);
    for (int64_t i = 0; i < count; ++i) gradients[i] = upstream(first + i, stats[i], label_logits[i]);

    parallel_units(count * pieces, std::min(kSegment, head.vocabulary), [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t i = unit / pieces, row = rows[first + i], start = unit % pieces * kSegment;
        char* x = logits_data + (i * head.vocabulary + start) * head.element;
        gradient_piece(head.dtype, x, head.bias_at(start), x, start, std::min(kSegment, head.vocabulary - start),
                       labels[row], labels.possible(row), head.scaling, gradients[i]);
      }
    });

    if (needs[0]) {
      const bool in_place = consecutive(rows, first, count);
      Tensor grad = in_place ? grad_hidden.narrow(0, rows[first], count)
                             : wrap(grad_gathered, count, head.size, head.hidden);
      at::cpu::mm_out(grad, logits, head.weight);
      const int64_t bytes = head.size * head.element;
      char* to = static_cast<char*>(grad_hidden.mutable_data_ptr());
      for (int64_t i = 0; i < count && !in_place; ++i)
        memcpy(to + rows[first + i] * bytes, static_cast<char*>(grad_gathered) + i * bytes, bytes);
    }
    if (needs[1] && !separate_sum) {
      if (first == 0)
        at::cpu::mm_out(weight_sum, logits.t(), hidden);
      else
        at::cpu::addmm_out(weight_sum, weight_sum, logits.t(), hidden);
    }
    for (int64_t start = 0; separate_sum && start < head.vocabulary; start += part_rows) {
      const int64_t n = std::min(part_rows, head.vocabulary - start);
      Tensor product = wrap(part, n, head.size, head.hidden);
      at::cpu::mm_out(product, logits.narrow(1, start, n).t(), hidden);
      float* sum = weight_sum.mutable_data_ptr<float>() + start * head.size;
      parallel_units(n, head.size, [&](int64_t begin, int64_t end) {
        k.accumulate(head.dtype, static_cast<char*>(part) + begin * head.size * head.element,
                     sum + begin * head.size, (end - begin) * head.size);
      });
    }
    if (needs[2]) {
      char* sum = static_cast<char*>(bias_sum.mutable_data_ptr());
      const int64_t real_size = bias_sum.element_size();
      parallel_units(pieces, count * kSegment, [&](int64_t begin, int64_t end) {
        for (int64_t piece = begin; piece < end; ++piece) {
          const int64_t start = piece * kSegment, n = std::min(kSegment, head.vocabulary - start);
          for (int64_t i = 0; i < count; ++i)
            k.accumulate(head.dtype, logits_data + (i * head.vocabulary + start) * head.element,
                         sum + start * real_size, n);
        }
      });
    }
  }
  if (separate_sum) {
    char* to = static_cast<char*>(grad_weight.mutable_data_ptr());
    const float* sum = weight_sum.const_data_ptr<float>();
    parallel_units(head.vocabulary, head.size, [&](int64_t begin, int64_t end) {
      k.round(head.dtype, sum + begin * head.size, to + begin * head.size * head.element, (end - begin) * head.size);
    });
  }
  return {grad_hidden, grad_weight, needs[2] ? bias_sum.to(head.hidden.scalar_type()) : none};
}

}  // namespace qt
