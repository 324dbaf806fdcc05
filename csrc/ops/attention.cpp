// Causal attention and its gradient. The backward computes the scores again: a row of them is in cache anyway.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include "operators.h"
#include "rows.h"
#include "workspace.h"

namespace qt {
namespace {

void check(const Tensor& query, const Tensor& key, const Tensor& value) {
  TORCH_CHECK_VALUE(query.dim() == 4 && key.dim() == 4 && key.sizes() == value.sizes(),
                    "query, key and value have shapes ", query.sizes(), ", ", key.sizes(), ", ", value.sizes(),
                    "; accepted: [B, heads, L, D] and twice [B, key heads, L, D]");
  TORCH_CHECK_VALUE(query.size(0) == key.size(0) && query.size(2) == key.size(2) && query.size(3) == key.size(3) &&
                        key.size(1) > 0 && query.size(1) % key.size(1) == 0,
                    "query has shape ", query.sizes(), " and key ", key.sizes(),
                    "; accepted: one shape but for the heads, of which query has a multiple");
  TORCH_CHECK_VALUE(query.scalar_type() != at::kDouble, "query has dtype float64; accepted: float32, bfloat16, float16");
  for (const Tensor* tensor : {&query, &key, &value}) {
    TORCH_CHECK_VALUE(tensor->scalar_type() == query.scalar_type(), "query, key and value have dtypes ",
                      query.scalar_type(), ", ", key.scalar_type(), ", ", value.scalar_type(), "; accepted: one");
    TORCH_CHECK_VALUE(tensor->stride(3) == 1, "query, key or value has stride ", tensor->stride(3),
                      " along its last dimension; accepted: 1");
  }
}

// [B, heads, L, D] in memory as the layers around attention have it, [B, L, heads, D].
Tensor empty_heads(const Tensor& like) {
  return at::empty({like.size(0), like.size(2), like.size(1), like.size(3)}, like.options()).transpose(1, 2);
}

HeadTensor head_of(const Tensor& tensor, int64_t b, int64_t head) {
  char* data = static_cast<char*>(tensor.data_ptr());
  return {data + (b * tensor.stride(0) + head * tensor.stride(1)) * tensor.element_size(), tensor.stride(2)};
}

// Calls f(head, b, index of the query head, workspace) for every query head.
template <typename F>
void for_heads(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out, double scale,
               int64_t elements, const F& f) {
  const int64_t heads = query.size(1), group = heads / key.size(1);
  const int64_t apart = padded(elements * sizeof(float)) / sizeof(float), threads = at::get_num_threads();
  Workspace workspace(threads * apart * sizeof(float));
  float* const scratch = workspace.take<float>(threads * apart);
  at::parallel_for(0, query.size(0) * heads, 1, [&](int64_t first, int64_t last) {
    float* own = scratch + at::get_thread_num() * apart;
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t b = unit / heads, head = unit % heads;
      f(AttentionHead{head_of(query, b, head), head_of(key, b, head / group), head_of(value, b, head / group),
                      head_of(out, b, head), query.size(2), query.size(3), float(scale),
                      /*packed=*/unit > first && head % group > 0},
        b, head, own);
    }
  });
}

}  // namespace

Tensor causal_attention(const Tensor& query, const Tensor& key, const Tensor& value, double scale) {
  at::AutoDispatchBelowADInplaceOrView guard;
  check(query, key, value);
  const DType dtype = dtype_of(query, "query");
  const Tensor out = empty_heads(query);
  for_heads(query, key, value, out, scale, attention_workspace(query.size(2), query.size(3), 2, 1),
            [&](const AttentionHead& head, int64_t, int64_t, float* workspace) {
              kernels().attention(dtype, head, workspace);
            });
  return out;
}

Tensors3 causal_attention_backward(const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value,
                                   double scale) {
  at::AutoDispatchBelowADInplaceOrView guard;
  check(query, key, value);
  TORCH_CHECK_VALUE(grad.sizes() == query.sizes() && grad.scalar_type() == query.scalar_type(), "grad has shape ",
                    grad.sizes(), " and dtype ", grad.scalar_type(), "; accepted: those of query");
  const DType dtype = dtype_of(query, "query");
  const int64_t length = query.size(2), dim = query.size(3), heads = query.size(1), group = heads / key.size(1);
  const Tensor upstream = grad.stride(3) == 1 ? grad : grad.contiguous();
  const Tensor grad_query = empty_heads(query), grad_key = empty_heads(key), grad_value = empty_heads(value);
  // of keys and values, by query head: [B, heads, 2, L, width]
  const Tensor by_head =
      at::empty({query.size(0) * heads, 2, length * attention_width(dim)}, query.options().dtype(at::kFloat));
  float* blocks = by_head.mutable_data_ptr<float>();
  for_heads(query, key, value, upstream, scale, attention_workspace(length, dim, 5, 2),
            [&](const AttentionHead& head, int64_t b, int64_t index, float* workspace) {
              kernels().attention_backward(dtype, head, head_of(grad_query, b, index),
                                           blocks + (b * heads + index) * by_head.stride(0), workspace);
            });
  at::parallel_for(0, query.size(0) * key.size(1), 1, [&](int64_t first, int64_t last) {
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t b = unit / key.size(1), head = unit % key.size(1);
      float* own = blocks + unit * group * by_head.stride(0);
      kernels().sum_heads(dtype, own, group, by_head.stride(0), length, dim, head_of(grad_key, b, head));
      kernels().sum_heads(dtype, own + by_head.stride(1), group, by_head.stride(0), length, dim,
                          head_of(grad_value, b, head));
    }
  });
  return {grad_query, grad_key, grad_value};
}

}  // namespace qt
