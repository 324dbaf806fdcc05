// The operators' arguments in the forms that the kernels read: rows, labels, per-token values. Their shapes and strides
// are those of the contract; kernels/functional.py makes them.
#pragma once

#include "../cpu/kernels.h"
#include "../registration.h"

namespace qt {

// Rows [A, C, V] of any strides with a dense last dimension.
struct Rows {
  explicit Rows(const Tensor& logits) : dtype(DType(dtype_of(logits))) {
    TORCH_CHECK_VALUE(logits.is_cpu() && logits.dim() == 3 && (logits.stride(2) == 1 || logits.size(2) == 1),
                      "logits is on ", logits.device(), " with shape ", logits.sizes(), " and strides ",
                      logits.strides(), "; accepted: [A, C, V] on cpu with a dense last dimension");
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
  explicit TokenValues(const OptTensor& tensor) {
    if (!tensor) return;
    held_ = tensor->to(at::kDouble);
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
      : held_(labels.to(at::kLong)), vocabulary_(rows.vocabulary), ignore_index_(ignore_index) {
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
