// What one instruction set offers: a table of functions on dense pieces of rows, free of torch.
#pragma once

#include <stdint.h>

#include "../core/online_stats.h"

namespace qt {

enum class DType { f32, f64, bf16, f16 };

// Rows are folded in pieces of this length, each from the identity and merged in order, so that the result does
// not depend on which thread took which piece.
constexpr int64_t kSegment = 16384;

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
  void (*exp)(const float* x, float* out, int64_t n);  // for tests
};

// The table of the best instruction set that this processor has; QTUNING_CPU_ISA forces one by name.
const Kernels& kernels();

}  // namespace qt
