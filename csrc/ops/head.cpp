#include "head.h"

#include <ATen/Context.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/stack.h>
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

// One thread multiplies and folds one tile of logits at a time, by itself: the tile stays in its cache, and the
// threads meet once per kGroupRows rows instead of twice per tile.
constexpr int64_t kTileRows = 512;
constexpr int64_t kTileColumns = 1024;
constexpr int64_t kGroupRows = 2048;
// Logits held at a time for a gradient: more rows per chunk mean fewer passes over the head and its gradient.
constexpr int64_t kChunkBytes = int64_t(44) << 20;

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

// x @ w.T + bias in float32 by oneDNN, which PyTorch itself uses for float32 only in compiled models: elsewhere it
// calls MKL, which leaves the wide vectors of processors of other makers unused. Null where it is missing or off
// (torch.backends.mkldnn).
const c10::OperatorHandle* onednn_linear() {
  static const auto found = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
  return found && at::globalContext().userEnabledMkldnn() ? &*found : nullptr;
}

Tensor call(const c10::OperatorHandle& linear, const Tensor& x, const Tensor& w, const OptTensor& bias = {}) {
  torch::jit::Stack stack;
  torch::jit::push(stack, x, w, bias, std::string("none"), c10::List<std::optional<at::Scalar>>(), std::string());
  linear.callBoxed(stack);
  return stack.front().toTensor();
}

// Columns [start, start + n) of hidden @ weight.T + bias, rounded once, as F.linear rounds them; in `buffer` or in
// memory of its own.
Tensor project(const Head& head, void* buffer, const Tensor& hidden, int64_t start, int64_t n) {
  const Tensor weight = head.weight.narrow(0, start, n);
  const OptTensor bias = head.bias.defined() ? OptTensor(head.bias.narrow(0, start, n)) : OptTensor();
  if (head.onednn) return call(*head.onednn, hidden, weight, bias);
  Tensor logits = wrap(buffer, hidden.size(0), n, head.hidden);
  if (bias)
    at::cpu::addmm_out(logits, *bias, hidden, weight.t());
  else
    at::cpu::mm_out(logits, hidden, weight.t());
  return logits;
}

int64_t even_chunk(int64_t total, int64_t limit) {
  const int64_t chunks = (total + limit - 1) / limit;
  return (total + chunks - 1) / chunks;
}

// Folds `count` whole rows of logits.
void fold_rows(const Head& head, const Labels& labels, const int64_t* rows, int64_t count, const char* logits,
               OnlineStats<double>* stats, double* label_logits) {
  const Kernels& k = kernels();
  parallel_units(count, head.vocabulary, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const char* x = logits + i * head.vocabulary * head.element;
      stats[i] = empty_stats<double>();
      for (int64_t start = 0; start < head.vocabulary; start += kSegment) {
        const int64_t n = std::min(kSegment, head.vocabulary - start);
        stats[i] = merge(stats[i], k.fold(head.dtype, x + start * head.element, n, head.scaling));
      }
      const int64_t label = labels[rows[i]];
      label_logits[i] =
          labels.possible(rows[i]) ? k.logit(head.dtype, x + label * head.element, head.scaling) : NAN;
    }
  });
}

// All columns of hidden @ weight.T + bias, in `buffer`.
Tensor project_rows(const Head& head, void* buffer, const Tensor& hidden) {
  if (!head.onednn) return project(head, buffer, hidden, 0, head.vocabulary);
  const int64_t count = hidden.size(0), columns = (head.vocabulary + kTileColumns - 1) / kTileColumns;
  at::parallel_for(0, columns, 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView guard;
    for (int64_t start = begin * kTileColumns; start < std::min(end * kTileColumns, head.vocabulary);
         start += kTileColumns) {
      const int64_t n = std::min(kTileColumns, head.vocabulary - start);
      const Tensor tile = project(head, nullptr, hidden, start, n);
      const float* from = tile.const_data_ptr<float>();
      for (int64_t i = 0; i < count; ++i)
        memcpy(static_cast<float*>(buffer) + i * head.vocabulary + start, from + i * n, n * sizeof(float));
    }
  });
  return wrap(buffer, count, head.vocabulary, head.hidden);
}

// Columns [start, start + n) of `count` rows of logits, become their gradient.
void differentiate(const Head& head, const Labels& labels, const int64_t* rows, const RowGradient<double>* gradients,
                   char* logits, int64_t count, int64_t start, int64_t n) {
  const int64_t pieces = pieces_of(n);
  parallel_units(count * pieces, std::min(kSegment, n), [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t i = unit / pieces, from = unit % pieces * kSegment;
      char* x = logits + (i * n + from) * head.element;
      gradient_piece(head.dtype, x, x, start + from, std::min(kSegment, n - from), labels[rows[i]],
                     labels.possible(rows[i]), head.scaling, gradients[i]);
    }
  });
}

// grad_logits @ weight, in `buffer` or in memory of its own.
Tensor times_weight(const Head& head, const Tensor& grad_logits, void* buffer) {
  if (head.onednn) return call(*head.onednn, grad_logits, head.weight.t());
  Tensor product = wrap(buffer, grad_logits.size(0), head.size, head.hidden);
  at::cpu::mm_out(product, grad_logits, head.weight);
  return product;
}

// sum (+)= grad_logits.T @ hidden
void add_weight_gradient(const Head& head, Tensor& sum, const Tensor& grad_logits, const Tensor& hidden, bool fresh) {
  if (!head.onednn) {
    if (fresh)
      at::cpu::mm_out(sum, grad_logits.t(), hidden);
    else
      at::cpu::addmm_out(sum, sum, grad_logits.t(), hidden);
    return;
  }
  const int64_t parts = (head.vocabulary + kTileColumns - 1) / kTileColumns;
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView guard;
    for (int64_t part = begin; part < end; ++part) {
      const int64_t start = part * kTileColumns, n = std::min(kTileColumns, head.vocabulary - start);
      const Tensor product = call(*head.onednn, grad_logits.narrow(1, start, n).t(), hidden.t());
      float* to = sum.mutable_data_ptr<float>() + start * head.size;
      if (fresh)
        memcpy(to, product.const_data_ptr(), n * head.size * sizeof(float));
      else
        kernels().accumulate(head.dtype, product.const_data_ptr(), to, n * head.size);
    }
  });
}

// sum += the rows of grad_logits
void add_bias_gradient(const Head& head, Tensor& sum, const char* grad_logits, int64_t count) {
  char* to = static_cast<char*>(sum.mutable_data_ptr());
  const int64_t pieces = pieces_of(head.vocabulary), real_size = sum.element_size();
  parallel_units(pieces, count * kSegment, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t start = piece * kSegment, n = std::min(kSegment, head.vocabulary - start);
      for (int64_t i = 0; i < count; ++i)
        kernels().accumulate(head.dtype, grad_logits + (i * head.vocabulary + start) * head.element,
                             to + start * real_size, n);
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
  onednn = dtype == DType::f32 ? onednn_linear() : nullptr;
}

void head_stats(const Head& head, const Labels& labels, const std::vector<int64_t>& rows, const OnStats& on_stats) {
  const int64_t total = static_cast<int64_t>(rows.size());
  if (total == 0) return;
  const int64_t group = even_chunk(total, kGroupRows);
  const int64_t threads = at::get_num_threads();
  const int64_t height = even_chunk(group, std::max<int64_t>(64, kTileRows * 16 / std::max<int64_t>(16, threads)));
  const int64_t width = std::min(head.vocabulary, kTileColumns);
  const int64_t bands = (group + height - 1) / height, columns = (head.vocabulary + width - 1) / width;
  const int64_t tile_bytes = padded(height * width * head.element);
  Workspace workspace(threads * tile_bytes + padded(group * head.size * head.element) +
                      padded(group * columns * sizeof(OnlineStats<double>)) + padded(group * sizeof(double)));
  char* tiles = static_cast<char*>(workspace.take_bytes(threads * tile_bytes));
  void* gathered = workspace.take_bytes(group * head.size * head.element);
  auto* parts = workspace.take<OnlineStats<double>>(group * columns);
  auto* label_logits = workspace.take<double>(group);
  const Kernels& k = kernels();
  for (int64_t first = 0; first < total; first += group) {
    const int64_t count = std::min(group, total - first);
    const Tensor hidden = gather(head, rows, first, count, gathered);
    std::fill_n(label_logits, count, NAN);
    at::parallel_for(0, columns * bands, 1, [&](int64_t begin, int64_t end) {
      at::AutoDispatchBelowADInplaceOrView guard;  // thread-local, so each thread needs its own
      char* tile = tiles + at::get_thread_num() * tile_bytes;
      for (int64_t unit = begin; unit < end; ++unit) {  // neighbouring units share their part of the weight
        const int64_t column = unit / bands, start = column * width, top = unit % bands * height;
        const int64_t n = std::min(width, head.vocabulary - start), m = std::min(height, count - top);
        if (m <= 0) continue;
        const Tensor logits = project(head, tile, hidden.narrow(0, top, m), start, n);
        for (int64_t i = 0; i < m; ++i) {
          const char* x = static_cast<const char*>(logits.const_data_ptr()) + i * n * head.element;
          parts[(top + i) * columns + column] = k.fold(head.dtype, x, n, head.scaling);
          const int64_t label = labels[rows[first + top + i]];
          if (label >= start && label < start + n)
            label_logits[top + i] = k.logit(head.dtype, x + (label - start) * head.element, head.scaling);
        }
      }
    });
    for (int64_t i = 0; i < count; ++i) {
      OnlineStats<double> stats = parts[i * columns];
      for (int64_t column = 1; column < columns; ++column) stats = merge(stats, parts[i * columns + column]);
      on_stats(first + i, stats, label_logits[i]);
    }
  }
}

Tensors3 head_gradient(const Head& head, const Labels& labels, const std::vector<int64_t>& rows, bool fold,
                       const RowUpstream& upstream, std::array<bool, 3> needs) {
  const int64_t total = static_cast<int64_t>(rows.size());
  const auto none = [&] { return at::empty({0}, head.hidden.options()); };
  const bool dense = total == head.hidden.size(0);
  Tensor grad_hidden = !needs[0] ? none() : dense ? at::empty_like(head.hidden) : at::zeros_like(head.hidden);
  needs[2] = needs[2] && head.bias.defined();
  if (total == 0) {
    return {grad_hidden, needs[1] ? at::zeros_like(head.weight) : none(),
            needs[2] ? at::zeros_like(head.bias) : none()};
  }

  const int64_t row_bytes = head.vocabulary * head.element, size_bytes = head.size * head.element;
  const int64_t chunk = even_chunk(total, std::max<int64_t>(16, kChunkBytes / row_bytes));
  // The sum of several chunks' products would round each of them to a low precision. The head's gradient then takes
  // a pass of its own, over columns of the logits of all rows, which are computed again.
  const bool by_columns = needs[1] && head.element == 2 && chunk < total;
  const int64_t width = std::clamp<int64_t>(kChunkBytes / (total * head.element) / 64 * 64, 64, head.vocabulary);
  const int64_t held = by_columns ? total : chunk;
  const auto real = head.hidden.options().dtype(stats_type(head.hidden));
  Tensor grad_weight = needs[1] ? at::empty_like(head.weight) : none();
  Tensor bias_sum = needs[2] ? at::zeros({head.vocabulary}, real) : none();

  const int64_t logits_bytes = std::max(chunk * row_bytes, by_columns ? total * width * head.element : 0);
  Workspace workspace(padded(logits_bytes) + padded(held * size_bytes) + padded(chunk * size_bytes) +
                      padded(chunk * sizeof(OnlineStats<double>)) + padded(chunk * sizeof(double)) +
                      padded(held * sizeof(RowGradient<double>)));
  char* data = static_cast<char*>(workspace.take_bytes(logits_bytes));
  void* gathered = workspace.take_bytes(held * size_bytes);
  void* grad_gathered = workspace.take_bytes(chunk * size_bytes);
  auto* stats = workspace.take<OnlineStats<double>>(chunk);
  auto* label_logits = workspace.take<double>(chunk);
  auto* gradients = workspace.take<RowGradient<double>>(held);

  for (int64_t first = 0; first < total; first += chunk) {
    const int64_t count = std::min(chunk, total - first);
    RowGradient<double>* gradient = gradients + (by_columns ? first : 0);
    const Tensor hidden = gather(head, rows, first, count, gathered);
    const Tensor logits = project_rows(head, data, hidden);
    if (fold) fold_rows(head, labels, rows.data() + first, count, data, stats, label_logits);
    for (int64_t i = 0; i < count; ++i) gradient[i] = upstream(first + i, stats[i], label_logits[i]);
    differentiate(head, labels, rows.data() + first, gradient, data, count, 0, head.vocabulary);

    if (needs[0]) {
      const Tensor product = times_weight(head, logits, grad_gathered);
      const char* from = static_cast<const char*>(product.const_data_ptr());
      char* to = static_cast<char*>(grad_hidden.mutable_data_ptr());
      for (int64_t i = 0; i < count; ++i) memcpy(to + rows[first + i] * size_bytes, from + i * size_bytes, size_bytes);
    }
    if (needs[1] && !by_columns) add_weight_gradient(head, grad_weight, logits, hidden, /*fresh=*/first == 0);
    if (needs[2]) add_bias_gradient(head, bias_sum, data, count);
  }
  for (int64_t start = 0; by_columns && start < head.vocabulary; start += width) {
    const int64_t n = std::min(width, head.vocabulary - start);
    const Tensor hidden = gather(head, rows, 0, total, gathered);
    const Tensor logits = project(head, data, hidden, start, n);
    differentiate(head, labels, rows.data(), gradients, data, total, start, n);
    Tensor part = grad_weight.narrow(0, start, n);
    at::cpu::mm_out(part, logits.t(), hidden);
  }
  return {grad_hidden, grad_weight, needs[2] ? bias_sum.to(head.hidden.scalar_type()) : none()};
}

}  // namespace qt
