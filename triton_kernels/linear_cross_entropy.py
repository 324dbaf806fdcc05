"""`linear_cross_entropy` on the GPU: the weighted loss and its gradients at once, weights known beforehand.

Chunks of rows, since a row's statistics need its whole vocabulary: a chunk's logits are computed and stored once,
`token_stats` reads them, `token_stats_backward_` turns the same buffer into their gradient, and the products with
the head and the hidden states read that. For a share ρ of live rows this costs 6NHV·ρ operations (4NHV·ρ with a
frozen head, whose product is left out, and with it the float32 sums) and 12 bytes of traffic per logit and live
row. Recomputing tiles instead, as cut-cross-entropy does, saves 6 of the 12 bytes for 2NHV·ρ more operations: on
an H100 2.6 ns a kilobyte against 2.5 ns a megaflop, so that the 12 bytes win for H above about 700.

Rows of weight 0 or with an ignored label are compacted away before, without asking the device how many stay
(`gemm.py`). The chunks' number is fixed by N; those behind the live rows end at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtuning_kernels.ops import stats_dtype
from qtuning_kernels.triton_kernels.gemm import column_sums, live_rows, multiply
from qtuning_kernels.triton_kernels.launch import FUSED, architecture, dot_precision, on_device
from qtuning_kernels.triton_kernels.linear_token_stats import linear_token_stats, project_tile, tile_config
from qtuning_kernels.triton_kernels.token_stats import token_stats
from qtuning_kernels.triton_kernels.token_stats_backward import launch as launch_backward


# Reads hidden and weight as a GEMM does; writes itemsize bytes per logit of the live rows.
@triton.jit
def project_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    count_ptr,
    N,
    V,
    H,
    stride,
    HAS_BIAS: tl.constexpr,
    EVEN_H: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    dtype: tl.constexpr,
):
    first_row = tl.program_id(0) * BLOCK_N
    first_column = tl.program_id(1) * BLOCK_V
    if first_row >= tl.load(count_ptr):
        return
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
    column = first_column + tl.arange(0, BLOCK_V)
    out_ptrs = out_ptr + row.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), (row < N)[:, None] & (column < V)[None, :])


def chunk_rows(rows: int, vocabulary: int, itemsize: int, trains_head: bool) -> int:
    """Rows of a chunk of logits.

    With a frozen head 1024 rows keep the products efficient, and 256 MiB hold them at any vocabulary in use. A
    trained head adds every chunk to float32 sums of the size of the weight, 8 bytes an entry; only from some 4096
    rows on is that below a tenth of the products' time.
    """
    workspace, least = (2**30, 4096) if trains_head else (2**28, 1024)
    fitting = workspace // (vocabulary * itemsize) // 128 * 128
    return min(rows, max(fitting, least))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    token_weight: Tensor | None,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Σ token_weight·nll and its gradients. A row of weight 0 counts as absent, whatever it holds."""
    rows, size = hidden.shape
    vocabulary = weight.shape[0]
    dtype = stats_dtype(hidden.dtype)
    none = hidden.new_empty(0)
    needs = [*needs[:2], needs[2] and bias is not None]
    weights = hidden.new_ones(rows, dtype=dtype) if token_weight is None else token_weight.to(dtype)
    if rows == 0:
        grads = (torch.zeros_like(x) if need else none for x, need in zip((hidden, weight, bias), needs, strict=True))
        return hidden.new_zeros((), dtype=dtype), *grads

    live = (labels != ignore_index) & (weights != 0)
    index, count = live_rows(live)
    packed, weights = hidden[index], weights[index]
    packed_labels = labels.masked_fill(~live, ignore_index)[index]
    if not any(needs):
        nll = linear_token_stats(
            packed, weight, bias, packed_labels, ignore_index, logit_scale, softcap, count=count
        )[0]
        return _weighted_sum(weights, nll), none, none, none

    chunk = chunk_rows(rows, vocabulary, hidden.element_size(), needs[1])
    single = chunk >= rows
    pitch = triton.cdiv(vocabulary, 64) * 64  # rows stay aligned
    buffer = hidden.new_empty((chunk, pitch))
    nll = torch.empty(rows, dtype=dtype, device=hidden.device)
    packed_grad = torch.zeros_like(hidden) if needs[0] else none
    # the sums over chunks need float32; a single chunk's sums are made in registers
    grad_weight = torch.empty_like(weight, dtype=None if single else dtype) if needs[1] else none
    grad_bias = torch.empty(vocabulary, dtype=dtype, device=hidden.device) if needs[2] else none
    config = tile_config(rows, hidden.element_size(), architecture(hidden))

    for first in range(0, rows, chunk):
        part = slice(first, min(first + chunk, rows))
        here = part.stop - first
        left = (count - first).clamp_(0, here)
        logits = buffer[:here, :vocabulary].unsqueeze(0)  # [1, here, V]
        with on_device(hidden):
            project_kernel[(triton.cdiv(here, config["BLOCK_N"]), triton.cdiv(vocabulary, config["BLOCK_V"]))](
                packed[part],
                weight,
                bias,
                buffer,
                left,
                here,
                vocabulary,
                size,
                pitch,
                HAS_BIAS=bias is not None,
                EVEN_H=size % config["BLOCK_H"] == 0,
                PRECISION=dot_precision(hidden),
                dtype=tl.float64 if dtype == torch.float64 else tl.float32,
                **config,
                **FUSED,
            )
        chunk_labels = packed_labels[part].unsqueeze(0)
        stats = token_stats(logits, chunk_labels, ignore_index, logit_scale, softcap)
        nll[part] = stats[0].squeeze(0)
        upstream = (weights[part].unsqueeze(0), None, None)
        launch_backward(
            logits, logits, chunk_labels, stats[1:], upstream, ignore_index, logit_scale, softcap, count=left
        )
        g = logits.squeeze(0)
        if needs[0]:
            multiply(g, weight, packed_grad[part], left, limit="M", add=False)
        if needs[1]:
            multiply(g.T, packed[part], grad_weight, left, limit="K", add=first > 0)
        if needs[2]:
            column_sums(g, grad_bias, left, add=first > 0)
    grad_hidden = torch.empty_like(hidden).index_copy_(0, index, packed_grad) if needs[0] else none
    return (
        _weighted_sum(weights, nll),
        grad_hidden,
        grad_weight.to(weight.dtype) if needs[1] else none,
        grad_bias.to(bias.dtype) if needs[2] else none,
    )


def _weighted_sum(weights: Tensor, nll: Tensor) -> Tensor:
    return (weights * nll.masked_fill(weights == 0, 0.0)).sum()
