// What one instruction set offers: a table of functions on dense pieces of rows, free of torch.
#pragma once

#include <stdint.h>

#include "../core/online_stats.h"

namespace qt {

enum class DType { f32, f64, bf16, f16 };

// Rows are folded in pieces of this length, each from the identity and merged in order, so that the result does
// not depend on which thread took which piece.
constexpr int64_t kSegment = 16384;

// One head of a tensor of attention, [length, dim], rows `stride` elements apart.
struct HeadTensor {
  void* data;
  int64_t stride;
};

// Causal attention of one head. In the backward, `out` is its gradient.
struct AttentionHead {
  HeadTensor q, k, v, out;
  int64_t length, dim;
  float scale;
  bool packed;  // the workspace still holds these keys and values
};

// A length and a dimension rounded up to whole tiles of any instruction set.
QT_FUNCTION int64_t attention_padded(int64_t length) { return (length + 47) / 48 * 48; }
QT_FUNCTION int64_t attention_width(int64_t dim) { return (dim + 15) / 16 * 16; }
// The float32 elements to work in, for `copies` of keys or values and `rows` blocks of scores.
QT_FUNCTION int64_t attention_workspace(int64_t length, int64_t dim, int64_t copies, int64_t rows) {
  return attention_padded(length) * (copies * attention_width(dim) + 8 * rows) + 3 * 8 * attention_width(dim);
}

struct Kernels {
  const char* isa;
  // (m, S, T) of n logits x; reads x once from memory, twice from L1
  OnlineStats<double> (*fold)(DType, const void* x, int64_t n, const Scaling<double>&);
  // the scaled logit of one element
  double (*logit)(DType, const void* x, const Scaling<double>&);
  // the gradient of n logits, without the label's term; `out` may be `x`
  void (*gradient)(DType, const void* x, void* out, int64_t n, const Scaling<double>&,
                   const RowGradient<double>&);
  // the gradient of the label's logit, whose scaled value is z
  void (*label_gradient)(DType, double z, void* out, const Scaling<double>&, const RowGradient<double>&);
  void (*fill)(DType, void* out, int64_t n, double value);
  // sum[i] += x[i]; sum is float64 for float64, else float32
  void (*accumulate)(DType, const void* x, void* sum, int64_t n);
  // causal attention, not for float64
  void (*attention)(DType, const AttentionHead&, float* workspace);
  // grad_keys: [2, length, attention_width(dim)], gradients of k and of v
  void (*attention_backward)(DType, const AttentionHead&, const HeadTensor& grad_q, float* grad_keys,
                             float* workspace);
  // out = the sum of `heads` blocks [length, attention_width(dim)], `apart` elements apart; overwrites the first
  void (*sum_heads)(DType, float* blocks, int64_t heads, int64_t apart, int64_t length, int64_t dim,
                    const HeadTensor& out);
  void (*exp)(const float* x, float* out, int64_t n);  // for tests
};

// The table of the best instruction set that this processor has; QTUNING_CPU_ISA forces one by name.
const Kernels& kernels();

}  // namespace qt
