// The row operators of qtuning_kernels/kernels/contract.py for CPU tensors. Forward reads each active logit once;
// backward reads and writes each active one once, and only writes the zeros of the others.
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <memory>
#include <vector>

#include "../cpu/zero.h"
#include "arguments.h"

namespace qt {
namespace {

// Calls f(i) for i in [0, count) on at::get_num_threads() threads, where each touches `elements`.
template <typename F>
void parallel_over(int64_t count, int64_t elements, const F& f) {
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, elements));
  at::parallel_for(0, count, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) f(i);
  });
}

// z·log2 e of the label, relative to `reference`.
double label_bits(const Rows& rows, int64_t row, int64_t label, const Scaling<double>& scaling, double reference) {
  const double value = kernels().scaled_value(rows.dtype, rows.at(row, label), scaling);
  return value * factor_of(scaling) * Log2<double>::e - reference;
}

template <typename R>
Stats stats_of(const Rows& rows, const Tensor& logits, const Tensor& labels_tensor, int64_t ignore_index,
               const Scaling<double>& scaling) {
  const Labels labels(labels_tensor, rows, ignore_index);
  Tensor out[4];
  R* data[4];
  for (int k = 0; k < 4; ++k) {
    out[k] = at::zeros(labels_tensor.sizes(), logits.options().dtype(c10::CppTypeToScalarType<R>::value));
    data[k] = out[k].mutable_data_ptr<R>();
  }
  std::vector<int64_t> order;
  for (int64_t i = 0; i < rows.count; ++i)
    if (!labels.ignored(i)) order.push_back(i);
  const int64_t active = order.size();
  const std::unique_ptr<OnlineStats<double>[]> chunks(new OnlineStats<double>[active * rows.chunks]);
  parallel_over(active * rows.chunks, rows.chunk_size(0), [&](int64_t i) {
    const int64_t start = i % rows.chunks * kChunk;
    chunks[i] =
        kernels().chunk_stats(rows.dtype, rows.at(order[i / rows.chunks], start), rows.chunk_size(start), scaling);
  });
  parallel_over(active, 256, [&](int64_t i) {
    OnlineStats<double> stats = chunks[i * rows.chunks];
    for (int64_t c = 1; c < rows.chunks; ++c) stats = merge(stats, chunks[i * rows.chunks + c]);
    const int64_t row = order[i];
    const double bits = labels.in_range(row) ? label_bits(rows, row, labels[row], scaling, stats.row_max) : NAN;
    const TokenStats<R> nats = finalize<R>(stats, bits);
    data[0][row] = nats.nll, data[1][row] = nats.entropy, data[2][row] = nats.row_max, data[3][row] = nats.log_sum;
  });
  return {out[0], out[1], out[2], out[3]};
}

// In float64, since p - 1 cancels for a certain label. `value` is the label's scaled value.
double label_gradient(double value, const Scaling<double>& scaling, const RowGradient<double>& row) {
  const double log_p = (value * factor_of(scaling) - row.row_max) - row.log_sum;
  const double of_z = gradient_of_bits<true>(log_p * Log2<double>::e, gradient_bits_of(0.0, 0.0, row, 1.0));
  const double slope = scaling.logit_scale * (scaling.softcap != 0 ? 1 - value * value : 1);
  return (of_z - row.grad_nll) * slope;
}

// The gradient of the chunk of a row that begins at `start`, the label's entry included.
void gradient_of_chunk(const Rows& from, const Rows& to, int64_t row, int64_t start, const Labels& labels,
                       const Scaling<double>& scaling, const RowGradient<double>& upstream) {
  const Kernels& k = kernels();
  const int64_t n = from.chunk_size(start), label = labels[row];
  char* out = to.at(row, start);
  if (!labels.in_range(row)) return k.fill(from.dtype, out, n, NAN);
  const bool inside = label >= start && label < start + n;
  // read before the logits are overwritten
  const double value = inside ? k.scaled_value(from.dtype, from.at(row, label), scaling) : 0;
  k.gradient(from.dtype, from.at(row, start), out, n, scaling, upstream);
  if (inside) k.fill(from.dtype, to.at(row, label), 1, label_gradient(value, scaling, upstream));
}

void backward_into(const Tensor& out, const Tensor& logits, const Tensor& labels_tensor, const Tensor& entropy,
                   const Tensor& row_max, const Tensor& log_sum, const OptTensor& grad_nll,
                   const OptTensor& grad_entropy, const OptTensor& grad_lse, int64_t ignore_index, double logit_scale,
                   OptDouble softcap) {
  const Scaling<double> scaling = {logit_scale, softcap.value_or(0)};
  const Rows from(logits), to(out);
  const Labels labels(labels_tensor, from, ignore_index);
  const int64_t count = from.count;
  const TokenValues h(entropy), top(row_max), sum(log_sum), g_nll(grad_nll), g_entropy(grad_entropy), g_lse(grad_lse);
  std::vector<int64_t> order, inactive;
  for (int64_t i = 0; i < count; ++i) {
    const bool active = !labels.ignored(i) && (g_nll[i] != 0 || g_entropy[i] != 0 || g_lse[i] != 0);
    (active ? order : inactive).push_back(i);
  }
  parallel_over(order.size() * from.chunks, from.chunk_size(0), [&](int64_t i) {
    const int64_t row = order[i / from.chunks], start = i % from.chunks * kChunk;
    const RowGradient<double> upstream = {top[row],       sum[row],  h[row], g_nll[row] + g_lse[row],
                                          g_entropy[row], g_nll[row]};
    gradient_of_chunk(from, to, row, start, labels, scaling, upstream);
  });
  const int64_t row_bytes = to.vocabulary * to.element, rows = inactive.size();
  const bool streaming = rows * row_bytes >= kStreamFrom;
  parallel_over(rows, from.vocabulary, [&](int64_t i) { zero(to.at(inactive[i], 0), row_bytes, streaming); });
}

Stats token_stats(const Tensor& logits, const Tensor& labels, int64_t ignore_index, double logit_scale,
                  OptDouble softcap) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const Rows rows(logits);
  const auto f = rows.dtype == DType::f64 ? stats_of<double> : stats_of<float>;
  return f(rows, logits, labels, ignore_index, {logit_scale, softcap.value_or(0)});
}

Tensor exp2(const Tensor& x) {
  const Tensor out = at::empty_like(x);
  kernels().exp2(x.const_data_ptr<float>(), out.mutable_data_ptr<float>(), x.numel());
  return out;
}

std::string instruction_set() { return kernels().isa; }

}  // namespace
}  // namespace qt

// A private namespace; qtuning_kernels/kernels/native.py hands its operators on.
TORCH_LIBRARY(qtuning_native, m) {
  qt::register_operators<&qt::token_stats, &qt::backward_into>(m);
  m.def("exp2", &qt::exp2);
  m.def("instruction_set", &qt::instruction_set);
}
