"""`linear_token_stats_backward` on the GPU: gradients of hidden states, head weight and bias.

The statistics are known, so each logit's gradient follows from the logit alone, and the vocabulary can be worked
on in chunks: recompute a chunk's logits in tiles, turn them into gradients in registers (float32, never rounded
to the logits' dtype first), store those, and multiply. That costs 2NHV operations more than keeping the logits
would, and 6 bytes of traffic per logit and live row (written once, read by two products). Chunks of the vocabulary
rather than of the rows, since each then owns its part of the weight's gradient: it is summed over all rows in
registers and written once, where chunks of rows would each read and write a float32 copy of the whole.

Rows whose upstream gradients are all 0, or whose label is ignored, are compacted away before (`gemm.py`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtuning_kernels.kernels.dispatch import stats_dtype
from qtuning_kernels.triton_kernels.gemm import column_sums, live_rows, multiply
from qtuning_kernels.triton_kernels.launch import FUSED, architecture, dot_precision, on_device, rounded
from qtuning_kernels.triton_kernels.linear_token_stats import project_tile, tile_config
from qtuning_kernels.triton_kernels.row_math import scaled, scaling
from qtuning_kernels.triton_kernels.token_stats_backward import coefficients, gradient

WORKSPACE = 256 * 2**20  # bytes, for the gradients of one chunk of logits


# Reads hidden and weight as a GEMM does and 3 statistics per row and tile; writes itemsize bytes per logit.
@triton.jit
def linear_gradient_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    labels_ptr,
    entropy_ptr,
    row_max_ptr,
    log_sum_ptr,
    grad_nll_ptr,
    grad_entropy_ptr,
    grad_lse_ptr,
    count_ptr,
    out_ptr,
    first_chunk_column,  # of the vocabulary, which out_ptr's column 0 is
    last_chunk_column,
    N,
    V,
    H,
    stride,
    INNER: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    UNIT: tl.constexpr,
    SLOPE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NLL: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_LSE: tl.constexpr,
    EVEN_H: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    first_row = tl.program_id(0) * BLOCK_N
    first_column = first_chunk_column + tl.program_id(1) * BLOCK_V
    count = tl.load(count_ptr)
    if first_row >= count:
        return
    dtype: tl.constexpr = entropy_ptr.dtype.element_ty
    acc = project_tile(
        hidden_ptr,
        weight_ptr,
        bias_ptr,
        first_row,
        first_column,
        N,
        V,
        H,
        HAS_BIAS,
        EVEN_H,
        PRECISION,
        BLOCK_N,
        BLOCK_V,
        BLOCK_H,
        dtype,
    )
    row = first_row + tl.arange(0, BLOCK_N)
    valid = row < count
    column = first_column + tl.arange(0, BLOCK_V)
    label = tl.load(labels_ptr + row, valid, 0)
    zero = tl.zeros((BLOCK_N,), dtype)
    g_nll = tl.load(grad_nll_ptr + row, valid, 0.0) if HAS_NLL else zero
    g_entropy = tl.load(grad_entropy_ptr + row, valid, 0.0) if HAS_ENTROPY else zero
    g_lse = tl.load(grad_lse_ptr + row, valid, 0.0) if HAS_LSE else zero
    entropy = tl.load(entropy_ptr + row, valid, 0.0)
    row_max = tl.load(row_max_ptr + row, valid, 0.0)
    log_sum = tl.load(log_sum_ptr + row, valid, 0.0)
    possible = (label >= 0) & (label < V)
    reference, a, b = coefficients(entropy, row_max, log_sum, g_nll, g_entropy, g_lse, possible, SLOPE)
    g = gradient(acc, reference[:, None], a[:, None], b[:, None], INNER, HAS_SOFTCAP, UNIT, HAS_ENTROPY)
    if HAS_NLL:
        slope = (g_nll * SLOPE)[:, None]
        if HAS_SOFTCAP:
            squashed = scaled(acc, INNER, HAS_SOFTCAP)
            slope = slope * (1.0 - squashed * squashed)
        g -= tl.where(column[None, :] == label[:, None], slope, 0.0)
    out_ptrs = out_ptr + row.to(tl.int64)[:, None] * stride + (column - first_chunk_column)[None, :]
    tl.store(out_ptrs, rounded(g, out_ptr.dtype.element_ty), valid[:, None] & (column < last_chunk_column)[None, :])


def chunk_columns(rows: int, vocabulary: int, itemsize: int) -> int:
    """Columns of a chunk: what WORKSPACE holds, but at least 4096, below which adding to the float32 gradient of the
    hidden states (8 bytes per row and hidden unit and chunk) would show beside the products. A multiple of 128."""
    return min(vocabulary, max(4096, WORKSPACE // (rows * itemsize) // 128 * 128))


def linear_token_stats_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    entropy: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    grad_nll: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; an empty tensor for each that `needs` leaves out."""
    rows, size = hidden.shape
    vocabulary = weight.shape[0]
    if vocabulary == 1:
        grad_nll = grad_entropy = None  # both statistics are 0 whatever the logit
    upstream = (grad_nll, grad_entropy, grad_lse)
    given = [g for g in upstream if g is not None]
    needs = [*needs[:2], needs[2] and bias is not None]
    if rows == 0 or not given or not any(needs):
        grads = (
            torch.zeros_like(x) if need else hidden.new_empty(0)
            for x, need in zip((hidden, weight, bias), needs, strict=True)
        )
        return tuple(grads)

    index, count = live_rows((labels != ignore_index) & torch.stack([g != 0 for g in given]).any(0))
    packed = hidden[index]
    per_row = [None if x is None else x[index] for x in (labels, entropy, row_max, log_sum, *upstream)]
    chunk = chunk_columns(rows, vocabulary, hidden.element_size())
    pitch = triton.cdiv(chunk, 128) * 128  # rows stay aligned, and tiles need no mask
    gradients = hidden.new_empty((rows, pitch))
    dtype = stats_dtype(hidden.dtype)
    grad_hidden = torch.zeros((rows, size), dtype=dtype, device=hidden.device) if needs[0] else hidden.new_empty(0)
    grad_weight = torch.empty_like(weight) if needs[1] else hidden.new_empty(0)
    grad_bias = torch.empty(vocabulary, dtype=dtype, device=hidden.device) if needs[2] else hidden.new_empty(0)
    config = tile_config(rows, size, hidden.element_size(), architecture(hidden))

    for first in range(0, vocabulary, chunk):
        last = min(first + chunk, vocabulary)
        grid = triton.cdiv(rows, config["BLOCK_N"]), triton.cdiv(last - first, config["BLOCK_V"])
        with on_device(hidden):
            linear_gradient_kernel[grid](
                packed,
                weight,
                bias,
                *per_row,
                count,
                gradients,
                first,
                last,
                rows,
                vocabulary,
                size,
                pitch,
                **scaling(logit_scale, softcap),
                SLOPE=logit_scale,
                HAS_BIAS=bias is not None,
                HAS_NLL=grad_nll is not None,
                HAS_ENTROPY=grad_entropy is not None,
                HAS_LSE=grad_lse is not None,
                EVEN_H=size % config["BLOCK_H"] == 0,
                PRECISION=dot_precision(hidden),
                **config,
                **FUSED,
            )
        g = gradients[:, : last - first]
        gradients[:, last - first :] = 0
        if needs[0]:
            multiply(g, weight[first:last], grad_hidden, count, limit="M", add=first > 0)
        if needs[1]:
            multiply(g.T, packed, grad_weight[first:last], count, limit="K", add=False)
        if needs[2]:
            column_sums(g, grad_bias[first:last], count, add=False)
    if needs[0]:
        grad_hidden = torch.empty_like(hidden).index_copy_(0, index, grad_hidden.to(hidden.dtype))
    return grad_hidden, grad_weight, grad_bias.to(bias.dtype) if needs[2] else hidden.new_empty(0)
