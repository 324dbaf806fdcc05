// The CUDA kernels as PyTorch operators of a private namespace; qtuning_kernels/kernels/cuda.py hands them on.
//
// Only pointers, strides and the current stream pass from here to the C interface. QTUNING_CUDA_EMULATED builds the
// same file for CPU tensors, against kernels that tests/cuda_emulator runs on the host.
#include "cuda/qtuning_cuda.h"
#include "registration.h"

#ifndef QTUNING_CUDA_EMULATED
#include <c10/cuda/CUDAStream.h>
#endif

namespace qt {
namespace {

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
  TORCH_CHECK_VALUE(status != QT_BAD_ARGUMENT, qt_cuda_error_message());
  TORCH_CHECK(status == QT_OK, qt_cuda_error_message());
}

at::ScalarType stats_type(const Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

qt_logits view(const Tensor& logits) {
  TORCH_CHECK_VALUE(logits.device().type() == kDevice, "logits is on ", logits.device(), "; the cuda backend serves ",
                    kDevice);
  return {logits.data_ptr(), dtype_of(logits), logits.size(0),  logits.size(1),
          logits.size(2),    logits.stride(0), logits.stride(1)};
}

qt_labels view(const Tensor& labels, int64_t ignore_index) {
  return {labels.const_data_ptr(), int32_t(labels.element_size()), ignore_index};
}

Stats token_stats(const Tensor& logits, const Tensor& labels, int64_t ignore_index, double logit_scale,
                  OptDouble softcap) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const qt_logits in = view(logits);
  const qt_labels given = view(labels, ignore_index);
  const auto options = logits.options().dtype(stats_type(logits));
  Tensor out[4];
  for (Tensor& tensor : out) tensor = at::empty(labels.sizes(), options);
  const qt_target target = target_of(logits);
  int64_t bytes = 0;
  check(qt_cuda_token_stats_workspace(&in, target, &bytes));
  const Tensor workspace = at::empty({bytes}, logits.options().dtype(at::kByte));
  const qt_statistics statistics = {out[0].data_ptr(), out[1].data_ptr(), out[2].data_ptr(), out[3].data_ptr()};
  check(qt_cuda_token_stats(&in, &given, {logit_scale, softcap.value_or(0)}, &statistics,
                            bytes ? workspace.data_ptr() : nullptr, target));
  return {out[0], out[1], out[2], out[3]};
}

void backward_into(const Tensor& grad, const Tensor& logits, const Tensor& labels, const Tensor& entropy,
                   const Tensor& row_max, const Tensor& log_sum, const OptTensor& grad_nll,
                   const OptTensor& grad_entropy, const OptTensor& grad_lse, int64_t ignore_index, double logit_scale,
                   OptDouble softcap) {
  const qt_logits in = view(logits), out = view(grad);
  const qt_labels given = view(labels, ignore_index);
  Tensor held[6];
  const void* pointers[6] = {};
  const OptTensor values[6] = {entropy, row_max, log_sum, grad_nll, grad_entropy, grad_lse};
  for (int i = 0; i < 6; ++i) {
    if (!values[i]) continue;
    held[i] = values[i]->to(stats_type(logits));  // itself but for a gradient of another dtype
    pointers[i] = held[i].const_data_ptr();
  }
  const qt_upstream upstream = {pointers[0], pointers[1], pointers[2], pointers[3], pointers[4], pointers[5]};
  check(qt_cuda_token_stats_backward(&in, &out, &given, &upstream, {logit_scale, softcap.value_or(0)},
                                     target_of(logits)));
}

}  // namespace
}  // namespace qt

TORCH_LIBRARY(qtuning_cuda, m) { qt::register_operators<&qt::token_stats, &qt::backward_into>(m); }
