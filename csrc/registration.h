// The row operators of a backend, registered with PyTorch by the schemas that SCHEMAS of
// qtuning_kernels/kernels/dispatch.py has.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#define QT_SCALING "int ignore_index, float logit_scale, float? softcap"
#define QT_STATS "Tensor entropy, Tensor row_max, Tensor log_sum"
#define QT_UPSTREAM "Tensor? grad_nll, Tensor? grad_entropy, Tensor? grad_lse"

namespace qt {

using at::Tensor;
using OptTensor = std::optional<Tensor>;
using OptDouble = std::optional<double>;
using Stats = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// The place of the logits' dtype in float32, float64, bfloat16, float16: the values of DType and of qt_dtype.
inline int dtype_of(const Tensor& logits) {
  const at::ScalarType types[] = {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf};
  for (int i = 0; i < 4; ++i)
    if (logits.scalar_type() == types[i]) return i;
  TORCH_CHECK_VALUE(false, "logits has dtype ", logits.scalar_type(),
                    "; accepted: float32, bfloat16, float16, float64");
}

// The two forms of a backward that writes the gradient of `logits` into another tensor or themselves.
template <typename Into>
struct Backward;
template <typename... Arguments>
struct Backward<void (*)(const Tensor& grad, const Tensor& logits, Arguments...)> {
  template <auto INTO>
  static Tensor out_of_place(const Tensor& logits, Arguments... arguments) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor grad = at::empty(logits.sizes(), logits.options());
    INTO(grad, logits, arguments...);
    return grad;
  }
  template <auto INTO>
  static void in_place(const Tensor& logits, Arguments... arguments) {
    at::AutoDispatchBelowADInplaceOrView guard;
    INTO(logits, logits, arguments...);
  }
};

template <auto STATS, auto INTO>
void register_operators(torch::Library& m) {
  using Form = Backward<decltype(INTO)>;
  m.def("token_stats(Tensor logits, Tensor labels, " QT_SCALING ") -> (Tensor, Tensor, Tensor, Tensor)", STATS);
  m.def("token_stats_backward(Tensor logits, Tensor labels, " QT_STATS ", " QT_UPSTREAM ", " QT_SCALING ") -> Tensor",
        &Form::template out_of_place<INTO>);
  m.def("token_stats_backward_(Tensor(a!) logits, Tensor labels, " QT_STATS ", " QT_UPSTREAM ", " QT_SCALING ") -> ()",
        &Form::template in_place<INTO>);
}

}  // namespace qt
