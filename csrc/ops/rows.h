// What the operators on rows of logits share: dtypes, labels, per-token tensors, and loops over them.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "../cpu/kernels.h"

namespace qt {

using OptionalTensor = std::optional<at::Tensor>;

DType dtype_of(const at::Tensor& tensor, const char* name);
at::ScalarType stats_type(const at::Tensor& tensor);
Scaling<double> scaling_of(double logit_scale, std::optional<double> softcap);

// A per-token tensor of any dtype, read as float64; 0 everywhere if it is absent.
class TokenValues {
 public:
  TokenValues(const OptionalTensor& tensor, int64_t count, const char* name);
  double operator[](int64_t i) const { return data_ ? data_[i] : 0; }

 private:
  at::Tensor held_;
  const double* data_ = nullptr;
};

// Labels as int64.
class Labels {
 public:
  Labels(const at::Tensor& labels, int64_t count, int64_t vocabulary, int64_t ignore_index);
  bool ignored(int64_t i) const { return data_[i] == ignore_index_; }
  bool in_range(int64_t i) const { return data_[i] >= 0 && data_[i] < vocabulary_; }
  int64_t operator[](int64_t i) const { return data_[i]; }
  int64_t count() const { return count_; }

 private:
  at::Tensor held_;
  const int64_t* data_;
  int64_t count_, vocabulary_, ignore_index_;
};

// Labels, statistics and upstream gradients of a backward pass, row by row.
class Upstream {
 public:
  Upstream(const at::Tensor& entropy, const at::Tensor& row_max, const at::Tensor& log_sum,
           const OptionalTensor& grad_nll, const OptionalTensor& grad_entropy, const OptionalTensor& grad_lse,
           int64_t count);
  // a row that has a gradient at all
  bool active(int64_t i) const { return grad_nll_[i] != 0 || grad_entropy_[i] != 0 || grad_lse_[i] != 0; }
  RowGradient<double> row(int64_t i) const {
    return {row_max_[i], log_sum_[i], entropy_[i], grad_nll_[i] + grad_lse_[i], grad_entropy_[i], grad_nll_[i]};
  }

 private:
  TokenValues entropy_, row_max_, log_sum_, grad_nll_, grad_entropy_, grad_lse_;
};

// The four outputs of a forward pass, zero where nothing is stored.
class StatsOutputs {
 public:
  StatsOutputs(const at::Tensor& like, at::IntArrayRef shape);
  void store(int64_t i, const OnlineStats<double>& row, double label_bits);
  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> tuple() const {
    return {tensors_[0], tensors_[1], tensors_[2], tensors_[3]};
  }

 private:
  template <typename R>
  void write(int64_t i, const TokenStats<R>& stats) {
    const R values[4] = {stats.nll, stats.entropy, stats.row_max, stats.log_sum};
    for (int k = 0; k < 4; ++k) static_cast<R*>(data_[k])[i] = values[k];
  }

  at::Tensor tensors_[4];
  void* data_[4];
  bool is_double_;
};

// The gradient of one chunk [start, start + n) of a row, the label's entry included. x and out point at the chunk.
void gradient_chunk(DType dtype, const void* x, void* out, int64_t start, int64_t n, int64_t label,
                    bool in_range, const Scaling<double>& scaling, const RowGradient<double>& row);

inline int64_t chunks_of(int64_t vocabulary) { return (vocabulary + kChunk - 1) / kChunk; }

// Calls f(first, last) over [0, count) on at::get_num_threads() threads, where each item touches `elements`.
template <typename F>
void parallel_over(int64_t count, int64_t elements, const F& f) {
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, elements));
  at::parallel_for(0, count, grain, f);
}

}  // namespace qt
