#include "rows.h"

#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

namespace qt {

DType dtype_of(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.device().is_cpu(), name, " is on ", tensor.device(), "; the native backend serves cpu");
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return DType::f32;
    case at::kDouble:
      return DType::f64;
    case at::kBFloat16:
      return DType::bf16;
    case at::kHalf:
      return DType::f16;
    default:
      TORCH_CHECK_VALUE(false, name, " has dtype ", tensor.scalar_type(),
                        "; accepted: float32, bfloat16, float16, float64");
  }
}

at::ScalarType stats_type(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

Scaling<double> scaling_of(double logit_scale, std::optional<double> softcap) {
  TORCH_CHECK_VALUE(!softcap || *softcap > 0, "softcap is ", softcap.value_or(0), "; accepted: a number above 0, None");
  return {logit_scale, softcap.value_or(0.0)};
}

TokenValues::TokenValues(const OptionalTensor& tensor, int64_t count, const char* name) {
  if (!tensor || !tensor->defined()) return;
  TORCH_CHECK_VALUE(tensor->numel() == count, name, " has ", tensor->numel(), " elements for ", count, " tokens");
  TORCH_CHECK_VALUE(tensor->device().is_cpu(), name, " is on ", tensor->device(), "; the native backend serves cpu");
  held_ = tensor->to(at::kDouble).contiguous();
  data_ = held_.const_data_ptr<double>();
}

Labels::Labels(const at::Tensor& labels, int64_t count, int64_t vocabulary, int64_t ignore_index)
    : count_(count), vocabulary_(vocabulary), ignore_index_(ignore_index) {
  TORCH_CHECK_VALUE(labels.numel() == count, "labels has ", labels.numel(), " elements for ", count, " tokens");
  TORCH_CHECK_VALUE(labels.device().is_cpu(), "labels is on ", labels.device(), "; the native backend serves cpu");
  TORCH_CHECK_VALUE(labels.scalar_type() == at::kLong || labels.scalar_type() == at::kInt, "labels has dtype ",
                    labels.scalar_type(), "; accepted: int64, int32");
  held_ = labels.to(at::kLong).contiguous();
  data_ = held_.const_data_ptr<int64_t>();
}

Upstream::Upstream(const at::Tensor& entropy, const at::Tensor& row_max, const at::Tensor& log_sum,
                   const OptionalTensor& grad_nll, const OptionalTensor& grad_entropy, const OptionalTensor& grad_lse,
                   int64_t count)
    : entropy_(entropy, count, "entropy"),
      row_max_(row_max, count, "row_max"),
      log_sum_(log_sum, count, "log_sum"),
      grad_nll_(grad_nll, count, "grad_nll"),
      grad_entropy_(grad_entropy, count, "grad_entropy"),
      grad_lse_(grad_lse, count, "grad_lse") {}

StatsOutputs::StatsOutputs(const at::Tensor& like, at::IntArrayRef shape)
    : is_double_(stats_type(like) == at::kDouble) {
  for (int i = 0; i < 4; ++i) {
    tensors_[i] = at::zeros(shape, like.options().dtype(stats_type(like)));
    data_[i] = tensors_[i].mutable_data_ptr();
  }
}

void StatsOutputs::store(int64_t i, const OnlineStats<double>& row, double label_bits) {
  if (is_double_)
    write<double>(i, finalize<double>(row, label_bits));
  else
    write<float>(i, finalize<float>(row, label_bits));
}

// In float64, since p - 1 cancels for a certain label. `value` is the label's scaled value.
static double label_gradient(double value, const Scaling<double>& scaling, const RowGradient<double>& row) {
  const double log_p = (value * factor_of(scaling) - row.row_max) - row.log_sum;
  const double of_z = gradient_of_bits<true>(log_p * Log2<double>::e, gradient_bits_of(0.0, 0.0, row, 1.0));
  const double slope = scaling.logit_scale * (scaling.softcap != 0 ? 1 - value * value : 1);
  return (of_z - row.grad_nll) * slope;
}

void gradient_chunk(DType dtype, const void* x, void* out, int64_t start, int64_t n, int64_t label,
                    bool in_range, const Scaling<double>& scaling, const RowGradient<double>& row) {
  const Kernels& k = kernels();
  if (!in_range) return k.fill(dtype, out, n, NAN);
  const bool inside = label >= start && label < start + n;
  const int64_t size = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
  const int64_t offset = (label - start) * size;
  // read before x is overwritten
  const double value = inside ? k.scaled_value(dtype, static_cast<const char*>(x) + offset, scaling) : 0;
  k.gradient(dtype, x, out, n, scaling, row);
  if (inside) k.fill(dtype, static_cast<char*>(out) + offset, 1, label_gradient(value, scaling, row));
}

}  // namespace qt
