// The operators' arguments, checked and in the forms that the kernels read: rows, labels, per-token values.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

#include "../cpu/kernels.h"

namespace qt {

using at::Tensor;
using OptTensor = std::optional<Tensor>;
using OptDouble = std::optional<double>;

inline void check_device(const Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.device().is_cpu(), name, " is on ", tensor.device(), "; the native backend serves cpu");
}

inline DType dtype_of(const Tensor& tensor, const char* name) {
  check_device(tensor, name);
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

inline Scaling<double> scaling_of(double logit_scale, OptDouble softcap) {
  TORCH_CHECK_VALUE(!softcap || *softcap > 0, "softcap is ", softcap.value_or(0), "; accepted: a number above 0, None");
  return {logit_scale, softcap.value_or(0.0)};
}

// Rows [A, C, V] of any strides with a dense last dimension.
struct Rows {
  explicit Rows(const Tensor& logits) : dtype(dtype_of(logits, "logits")) {
    TORCH_CHECK_VALUE(logits.dim() == 3 && logits.size(2) >= 1, "logits has shape ", logits.sizes(),
                      "; accepted: [A, C, V] with V >= 1");
    TORCH_CHECK_VALUE(logits.stride(2) == 1 || logits.size(2) == 1, "logits has stride ", logits.stride(2),
                      " along the vocabulary; accepted: 1");
    data = static_cast<char*>(logits.data_ptr());
    inner = logits.size(1), count = logits.size(0) * inner, vocabulary = logits.size(2);
    chunks = (vocabulary + kChunk - 1) / kChunk;
    outer_stride = logits.stride(0), inner_stride = logits.stride(1), element = logits.element_size();
  }
  char* at(int64_t row, int64_t column) const {
    return data + (row / inner * outer_stride + row % inner * inner_stride + column) * element;
  }
  int64_t chunk_size(int64_t start) const { return vocabulary - start < kChunk ? vocabulary - start : kChunk; }

  DType dtype;
  char* data;
  int64_t inner, count, vocabulary, chunks, outer_stride, inner_stride, element;
};

// A per-token tensor of any dtype, read as float64; 0 everywhere if it is absent.
class TokenValues {
 public:
  TokenValues(const OptTensor& tensor, int64_t count, const char* name) {
    if (!tensor || !tensor->defined()) return;
    TORCH_CHECK_VALUE(tensor->numel() == count, name, " has ", tensor->numel(), " elements for ", count, " tokens");
    check_device(*tensor, name);
    held_ = tensor->to(at::kDouble).contiguous();
    data_ = held_.const_data_ptr<double>();
  }
  double operator[](int64_t i) const { return data_ ? data_[i] : 0; }

 private:
  Tensor held_;
  const double* data_ = nullptr;
};

// Labels as int64.
class Labels {
 public:
  Labels(const Tensor& labels, const Rows& rows, int64_t ignore_index)
      : vocabulary_(rows.vocabulary), ignore_index_(ignore_index) {
    TORCH_CHECK_VALUE(labels.numel() == rows.count, "labels has ", labels.numel(), " elements for ", rows.count,
                      " tokens");
    check_device(labels, "labels");
    TORCH_CHECK_VALUE(labels.scalar_type() == at::kLong || labels.scalar_type() == at::kInt, "labels has dtype ",
                      labels.scalar_type(), "; accepted: int64, int32");
    held_ = labels.to(at::kLong).contiguous();
    data_ = held_.const_data_ptr<int64_t>();
  }
  bool ignored(int64_t i) const { return data_[i] == ignore_index_; }
  bool in_range(int64_t i) const { return data_[i] >= 0 && data_[i] < vocabulary_; }
  int64_t operator[](int64_t i) const { return data_[i]; }

 private:
  Tensor held_;
  const int64_t* data_;
  int64_t vocabulary_, ignore_index_;
};

}  // namespace qt
