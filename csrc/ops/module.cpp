// Registers the operators under a private namespace; qtuning_kernels/kernels/native.py hands them on.
#include <ATen/ops/empty_like.h>
#include <Python.h>
#include <torch/library.h>

#include "../core/schemas.h"
#include "../cpu/kernels.h"
#include "operators.h"

namespace {

at::Tensor vector_exp2(const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat && x.is_contiguous(), "x must be contiguous float32");
  const at::Tensor out = at::empty_like(x);
  qt::kernels().exp2(x.const_data_ptr<float>(), out.mutable_data_ptr<float>(), x.numel());
  return out;
}

std::string instruction_set() { return qt::kernels().isa; }

}  // namespace

TORCH_LIBRARY(qtuning_native, m) {
  m.def(qt::kTokenStats, &qt::token_stats);
  m.def(qt::kTokenStatsBackward, &qt::token_stats_backward);
  m.def(qt::kTokenStatsBackwardInplace, &qt::token_stats_backward_);
  m.def("exp2", &vector_exp2);
  m.def("instruction_set", &instruction_set);
}

// The module itself is empty: importing it runs the registration above.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
