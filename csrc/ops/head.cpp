#include "head.h"

#include <ATen/core/LegacyTypeDispatch.h>
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

// Columns [start, start + n) of hidden @ weight.T + bias, rounded once, as F.linear rounds them.
void project(const Head& head, Tensor& logits, const Tensor& hidden, int64_t start, int64_t n) {
  const Tensor weight = head.weight.narrow(0, start, n).t();
  if (head.bias.defined())
    at::cpu::addmm_out(logits, head.bias.narrow(0, start, n), hidden, weight);
  else
    at::cpu::mm_out(logits, hidden, weight);
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
        Tensor logits = wrap(tile, m, n, head.hidden);
        project(head, logits, hidden.narrow(0, top, m), start, n);
        for (int64_t i = 0; i < m; ++i) {
          const char* x = tile + i * n * head.element;
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

  const int64_t limit = std::max<int64_t>(16, kChunkBytes / (head.vocabulary * head.element));
  const int64_t chunk = even_chunk(total, limit);
  const bool one_chunk = chunk == total;
  const bool low_precision = head.element == 2;
  const auto real = head.hidden.options().dtype(stats_type(head.hidden));
  Tensor grad_weight = needs[1] ? at::empty_like(head.weight) : none();
  // several chunks of a low-precision gradient are summed in float32, and rounded once
  const bool separate_sum = needs[1] && low_precision && !one_chunk;
  Tensor weight_sum = separate_sum ? at::zeros(head.weight.sizes(), real) : grad_weight;
  Tensor bias_sum = needs[2] ? at::zeros({head.vocabulary}, real) : none();

  const int64_t part_rows = std::min(head.vocabulary, kTileColumns);
  const int64_t part_bytes = padded(part_rows * head.size * head.element);
  Workspace workspace(padded(chunk * head.vocabulary * head.element) +
                      2 * padded(chunk * head.size * head.element) + padded(chunk * sizeof(OnlineStats<double>)) +
                      padded(chunk * sizeof(double)) + padded(chunk * sizeof(RowGradient<double>)) +
                      (separate_sum ? at::get_num_threads() * part_bytes : 0));
  char* logits_data = static_cast<char*>(workspace.take_bytes(chunk * head.vocabulary * head.element));
  void* gathered = workspace.take_bytes(chunk * head.size * head.element);
  void* grad_gathered = workspace.take_bytes(chunk * head.size * head.element);
  auto* stats = workspace.take<OnlineStats<double>>(chunk);
  auto* label_logits = workspace.take<double>(chunk);
  auto* gradients = workspace.take<RowGradient<double>>(chunk);
  char* part_data =
      separate_sum ? static_cast<char*>(workspace.take_bytes(at::get_num_threads() * part_bytes)) : nullptr;

  const Kernels& k = kernels();
  const int64_t pieces = pieces_of(head.vocabulary);
  for (int64_t first = 0; first < total; first += chunk) {
    const int64_t count = std::min(chunk, total - first);
    const Tensor hidden = gather(head, rows, first, count, gathered);
    Tensor logits = wrap(logits_data, count, head.vocabulary, head.hidden);
    project(head, logits, hidden, 0, head.vocabulary);
    if (fold) fold_rows(head, labels, rows.data() + first, count, logits_data, stats, label_logits);
    for (int64_t i = 0; i < count; ++i) gradients[i] = upstream(first + i, stats[i], label_logits[i]);

    parallel_units(count * pieces, std::min(kSegment, head.vocabulary), [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t i = unit / pieces, row = rows[first + i], start = unit % pieces * kSegment;
        char* x = logits_data + (i * head.vocabulary + start) * head.element;
        gradient_piece(head.dtype, x, x, start, std::min(kSegment, head.vocabulary - start),
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
    const int64_t parts = separate_sum ? (head.vocabulary + part_rows - 1) / part_rows : 0;
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      at::AutoDispatchBelowADInplaceOrView guard;
      char* product_data = part_data + at::get_thread_num() * part_bytes;
      for (int64_t p = begin; p < end; ++p) {
        const int64_t start = p * part_rows, n = std::min(part_rows, head.vocabulary - start);
        Tensor product = wrap(product_data, n, head.size, head.hidden);
        at::cpu::mm_out(product, logits.narrow(1, start, n).t(), hidden);
        float* sum = weight_sum.mutable_data_ptr<float>() + start * head.size;
        k.accumulate(head.dtype, product_data, sum, n * head.size);
        // a GEMM of this precision rounds its result; once more, less that result, gives what was lost
        at::cpu::addmm_out(product, product, logits.narrow(1, start, n).t(), hidden, /*beta=*/-1, /*alpha=*/1);
        k.accumulate(head.dtype, product_data, sum, n * head.size);
      }
    });
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
  return {grad_hidden, grad_weight, needs[2] ? bias_sum.to(head.hidden.scalar_type()) : none()};
}

}  // namespace qt
