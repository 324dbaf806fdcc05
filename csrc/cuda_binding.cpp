// The CUDA kernels as PyTorch operators of a private namespace; qtuning_kernels/kernels/cuda.py hands them on.
//
// Only pointers, strides and the current stream pass from here to the C interface. QTUNING_CUDA_EMULATED builds the same
// file for CPU tensors, against kernels that tests/cuda_emulator runs on the host.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <Python.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "core/schemas.h"
#include "cuda/qtuning_cuda.h"

#ifndef QTUNING_CUDA_EMULATED
#include <c10/cuda/CUDAStream.h>
#endif

namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;
using OptDouble = std::optional<double>;

#ifdef QTUNING_CUDA_EMULATED
constexpr auto kDevice = at::kCPU;
qt_target target_of(const Tensor&) { return {0, nullptr}; }
#else
constexpr auto kDevice = at::kCUDA;
qt_target target_of(const Tensor& tensor) {
  const auto device = tensor.device().index();
  return {device, c10::cuda::getCurrentCUDAStream(device).stream()};
}
#endif

void check(int status) {
  if (status == QT_OK) return;
  TORCH_CHECK_VALUE(status == QT_CUDA_ERROR, qt_cuda_error_message());
  TORCH_CHECK(false, qt_cuda_error_message());
}

int32_t dtype_of(const Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.device().type() == kDevice, name, " is on ", tensor.device(), "; the cuda backend serves ",
                    kDevice);
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return QT_FLOAT32;
    case at::kDouble:
      return QT_FLOAT64;
    case at::kBFloat16:
      return QT_BFLOAT16;
    case at::kHalf:
      return QT_FLOAT16;
    default:
      TORCH_CHECK_VALUE(false, name, " has dtype ", tensor.scalar_type(),
                        "; accepted: float32, bfloat16, float16, float64");
  }
}

// `tensor` on the device of `like`, contiguous, in `dtype`; the conversion costs nothing where it is all that already.
Tensor normal(const Tensor& tensor, const Tensor& like, at::ScalarType dtype, const char* name) {
  TORCH_CHECK_VALUE(tensor.device() == like.device(), name, " is on ", tensor.device(), "; accepted: ", like.device());
  return tensor.to(dtype).contiguous();
}

at::ScalarType stats_type(const Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

qt_logits view(const Tensor& logits) {
  TORCH_CHECK_VALUE(logits.dim() == 3 && (logits.size(2) <= 1 || logits.stride(2) == 1), "logits has shape ",
                    logits.sizes(), " and strides ", logits.strides(), "; accepted: [A, C, V] with a dense last dimension");
  return {logits.data_ptr(), dtype_of(logits, "logits"), logits.size(0),  logits.size(1),
          logits.size(2),    logits.stride(0),           logits.stride(1)};
}

struct Labels {
  Labels(const Tensor& labels, const Tensor& logits, int64_t ignore_index)
      : held(normal(labels, logits, labels.scalar_type() == at::kInt ? at::kInt : at::kLong, "labels")),
        view{held.const_data_ptr(), int32_t(held.element_size()), ignore_index} {
    TORCH_CHECK_VALUE(labels.numel() == logits.size(0) * logits.size(1), "labels has shape ", labels.sizes(),
                      "; accepted: that of the rows of logits ", logits.sizes());
  }
  Tensor held;
  qt_labels view;
};

qt_scaling scaling_of(double logit_scale, OptDouble softcap) { return {logit_scale, softcap.value_or(0)}; }

std::tuple<Tensor, Tensor, Tensor, Tensor> token_stats(const Tensor& logits, const Tensor& labels, int64_t ignore_index,
                                                       double logit_scale, OptDouble softcap) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const qt_logits in = view(logits);
  const Labels given(labels, logits, ignore_index);
  const auto options = logits.options().dtype(stats_type(logits));
  Tensor out[4];
  for (Tensor& tensor : out) tensor = at::empty(labels.sizes(), options);
  const qt_target target = target_of(logits);
  int64_t bytes = 0;
  check(qt_cuda_token_stats_workspace(&in, target, &bytes));
  const Tensor workspace = at::empty({bytes}, logits.options().dtype(at::kByte));
  const qt_statistics statistics = {out[0].data_ptr(), out[1].data_ptr(), out[2].data_ptr(), out[3].data_ptr()};
  check(qt_cuda_token_stats(&in, &given.view, scaling_of(logit_scale, softcap), &statistics,
                            bytes ? workspace.data_ptr() : nullptr, bytes, target));
  return {out[0], out[1], out[2], out[3]};
}

void backward_into(const Tensor& grad, const Tensor& logits, const Tensor& labels, const Tensor& entropy,
                   const Tensor& row_max, const Tensor& log_sum, const OptTensor& grad_nll,
                   const OptTensor& grad_entropy, const OptTensor& grad_lse, int64_t ignore_index, double logit_scale,
                   OptDouble softcap) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const qt_logits in = view(logits), out = view(grad);
  const Labels given(labels, logits, ignore_index);
  Tensor held[6];
  const char* names[6] = {"entropy", "row_max", "log_sum", "grad_nll", "grad_entropy", "grad_lse"};
  const OptTensor values[6] = {entropy, row_max, log_sum, grad_nll, grad_entropy, grad_lse};
  const void* pointers[6] = {};
  for (int i = 0; i < 6; ++i) {
    if (!values[i]) continue;
    TORCH_CHECK_VALUE(values[i]->numel() == labels.numel(), names[i], " has shape ", values[i]->sizes(),
                      "; accepted: that of labels, ", labels.sizes());
    held[i] = normal(*values[i], logits, stats_type(logits), names[i]);
    pointers[i] = held[i].const_data_ptr();
  }
  const qt_upstream upstream = {pointers[0], pointers[1], pointers[2], pointers[3], pointers[4], pointers[5]};
  check(qt_cuda_token_stats_backward(&in, &out, &given.view, &upstream, scaling_of(logit_scale, softcap),
                                     target_of(logits)));
}

template <typename... Arguments>
Tensor token_stats_backward(const Tensor& logits, Arguments... arguments) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const Tensor grad = at::empty(logits.sizes(), logits.options());
  backward_into(grad, logits, arguments...);
  return grad;
}

template <typename... Arguments>
void token_stats_backward_(const Tensor& logits, Arguments... arguments) {
  backward_into(logits, logits, arguments...);
}

// The operators with the arguments of backward_into behind the logits.
template <typename... Arguments>
void register_backward(torch::Library& m, void (*)(const Tensor&, const Tensor&, Arguments...)) {
  m.def(qt::kTokenStatsBackward, &token_stats_backward<Arguments...>);
  m.def(qt::kTokenStatsBackwardInplace, &token_stats_backward_<Arguments...>);
}

}  // namespace

TORCH_LIBRARY(qtuning_cuda, m) {
  m.def(qt::kTokenStats, &token_stats);
  register_backward(m, &backward_into);
}

// The module itself is empty: importing it runs the registration above.
PyMODINIT_FUNC PyInit__cuda(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr,
                                   nullptr};
  return PyModule_Create(&definition);
}
