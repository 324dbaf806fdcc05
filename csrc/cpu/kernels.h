// What one instruction set offers: a table of functions on dense chunks of rows, free of torch.
#pragma once

#include <stdint.h>

#include "../core/online_stats.h"

namespace qt {

enum class DType { f32, f64, bf16, f16 };

// Rows are read in chunks of this length, each from the identity and merged in order, so that the result does
// not depend on which thread took which chunk.
constexpr int64_t kChunk = 16384;

struct Kernels {
  const char* isa;
  // of n logits x; reads x once from memory, twice from L1
  OnlineStats<double> (*chunk_stats)(DType, const void* x, int64_t n, const Scaling<double>&);
  // what `factor_of(scaling)` multiplies to z, of one element
  double (*scaled_value)(DType, const void* x, const Scaling<double>&);
  // the gradient of n logits, without the label's term; `out` may be `x`
  void (*gradient)(DType, const void* x, void* out, int64_t n, const Scaling<double>&, const RowGradient<double>&);
  void (*fill)(DType, void* out, int64_t n, double value);
  void (*exp2)(const float* x, float* out, int64_t n);  // of x in [-126, 128), for tests
};

// The table of the best instruction set that this processor has; QTUNING_CPU_ISA forces one by name.
const Kernels& kernels();

}  // namespace qt
