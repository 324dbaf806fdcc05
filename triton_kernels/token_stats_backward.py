"""`token_stats_backward` on the GPU: the gradient of nll, entropy and lse, in place or out of place."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtuning_kernels.kernels.contract import RowStats, Scaling, Upstream
from qtuning_kernels.triton_kernels.launch import FUSED, Rows, architecture, on_device, rounded, row_config, rows_of
from qtuning_kernels.triton_kernels.row_math import (
    LN2,
    LOG2E,
    NO_BITS,
    load_edge,
    load_words,
    scaled,
    scaling_constants,
)


# An active row: reads and writes itemsize bytes per element once. A pruned one: writes its zeros, reads nothing.
# With p = e^((z−m)−log S):
#   g_nll (p − 1[y]) − g_entropy p (log p + entropy) + g_lse p  =  p·(A + B·log2 p) − g_nll·1[y]
# The label's entry is written again after the loop, from float32.
@triton.jit
def token_stats_backward_kernel(
    logits_ptr,
    grad_ptr,
    labels_ptr,
    entropy_ptr,
    row_max_ptr,
    log_sum_ptr,
    grad_nll_ptr,
    grad_entropy_ptr,
    grad_lse_ptr,
    shift,  # elements between logits_ptr, which divides by 16 bytes, and the first logit
    grad_shift,
    stride_a,
    stride_c,
    grad_stride_a,
    grad_stride_c,
    size_c,
    V,
    ignore_index,
    INNER: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    UNIT: tl.constexpr,
    SLOPE: tl.constexpr,  # dz/dx, up to the softcap's 1 − tanh²
    HAS_NLL: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_LSE: tl.constexpr,
    VECTOR: tl.constexpr,  # elements of the gradient that 16 bytes hold
    SAME_LEAD: tl.constexpr,  # every row of the logits begins where the gradient's does within 16 bytes
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    a = row // size_c
    c = (row - a * size_c).to(tl.int64)
    start = shift + a.to(tl.int64) * stride_a + c * stride_c
    grad_start = grad_shift + a.to(tl.int64) * grad_stride_a + c * grad_stride_c
    dtype: tl.constexpr = entropy_ptr.dtype.element_ty

    label = tl.load(labels_ptr + row)
    g_nll = tl.load(grad_nll_ptr + row) if HAS_NLL else tl.zeros((), dtype)
    g_entropy = tl.load(grad_entropy_ptr + row) if HAS_ENTROPY else tl.zeros((), dtype)
    g_lse = tl.load(grad_lse_ptr + row) if HAS_LSE else tl.zeros((), dtype)

    # blocks begin at the 16 bytes that hold the start of the gradient's row, and the logits follow
    aligned = grad_start // VECTOR * VECTOR
    lead = (grad_start - aligned).to(tl.int32)
    end = lead + V
    lanes = tl.arange(0, BLOCK)
    full = tl.maximum(end // BLOCK, 1)  # blocks 1 .. full−1 lie inside the row
    done = 0
    out_ptr = grad_ptr + aligned

    if (label == ignore_index) | ((g_nll == 0) & (g_entropy == 0) & (g_lse == 0)):
        zeros = tl.zeros((BLOCK,), grad_ptr.dtype.element_ty)
        for _ in range(1, full):
            out_ptr += BLOCK
            tl.store(out_ptr + lanes, zeros)
        while done < end:
            tl.store(grad_ptr + aligned + done + lanes, zeros, (lanes >= lead - done) & (lanes < end - done))
            done = full * BLOCK if done == 0 else done + BLOCK
        return

    row_max = tl.load(row_max_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    entropy = tl.load(entropy_ptr + row)
    in_range = (label >= 0) & (label < V)
    reference, a_all, b = coefficients(entropy, row_max, log_sum, g_nll, g_entropy, g_lse, in_range, SLOPE)

    # in place, every warp must have read the logit at the label before the loop of another writes over it
    x_label = tl.load(logits_ptr + start + label, in_range, 0.0)
    if HAS_NLL:
        tl.debug_barrier()

    # with the same lead, start − lead is a multiple of the vector, which only this form says
    in_ptr = logits_ptr + (start // VECTOR * VECTOR if SAME_LEAD else start - lead)
    edge_ptr = in_ptr
    for _ in range(1, full):
        in_ptr += BLOCK
        out_ptr += BLOCK
        if SAME_LEAD and VECTOR == 8 and logits_ptr.dtype.element_ty == tl.bfloat16:
            even, odd = load_words(in_ptr, tl.arange(0, BLOCK // 2))
            tile = tl.reshape(tl.join(even, odd), (BLOCK,))
        else:
            tile = tl.load(in_ptr + lanes)
        g = gradient(tile, reference, a_all, b, INNER, HAS_SOFTCAP, UNIT, HAS_ENTROPY)
        tl.store(out_ptr + lanes, rounded(g, grad_ptr.dtype.element_ty))
    # the first block, and what is left after the last full one
    while done < end:
        x, inside = load_edge(edge_ptr + done, lanes, lead - done, end - done, VECTOR if SAME_LEAD else 1)
        g = gradient(x, reference, a_all, b, INNER, HAS_SOFTCAP, UNIT, HAS_ENTROPY)
        tl.store(grad_ptr + aligned + done + lanes, rounded(g, grad_ptr.dtype.element_ty), inside)
        done = full * BLOCK if done == 0 else done + BLOCK

    if HAS_NLL:
        g_label = gradient(x_label, reference, a_all, b, INNER, HAS_SOFTCAP, UNIT, HAS_ENTROPY)
        slope = g_nll * SLOPE
        if HAS_SOFTCAP:
            squashed = scaled(x_label, INNER, HAS_SOFTCAP)
            slope = slope * (1.0 - squashed * squashed)
        # another thread of the block has written this entry in the loop
        tl.debug_barrier()
        tl.store(grad_ptr + grad_start + label, rounded(g_label - slope, grad_ptr.dtype.element_ty), in_range)


@triton.jit
def coefficients(entropy, row_max, log_sum, g_nll, g_entropy, g_lse, in_range, SLOPE: tl.constexpr):
    """What `gradient` needs of a row: the reference r = (row_max + log_sum)·log2 e, A and B.

    A large common offset leaves r a rounding error that would be a factor of the whole row. The error is known, so
    it goes into A and B and costs nothing per element. A label out of range makes the row NaN.
    """
    high = row_max * LOG2E
    low = log_sum * LOG2E
    reference = high + low
    part = reference - high
    excess = -((high - (reference - part)) + (low - part) + tl.fma(row_max, LOG2E, -high))
    factor = tl.exp2(excess) * SLOPE
    b = -g_entropy * LN2
    a = tl.where(in_range, g_nll + g_lse - g_entropy * entropy, float("nan"))
    return reference, tl.fma(b, excess, a) * factor, b * factor


@triton.jit
def gradient(
    x,
    reference,
    a,
    b,
    INNER: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
):
    """p·(A + B·log2 p), and the softcap's slope: one multiply-add, one exponential and one product per element."""
    x = scaled(x, INNER, HAS_SOFTCAP)
    t = tl.fma(x, UNIT, -reference)
    g = tl.exp2(t)
    g = g * (tl.fma(tl.maximum(t, NO_BITS), b, a) if HAS_ENTROPY else a)
    if HAS_SOFTCAP:
        g = g * (1.0 - x * x)
    return g


def backward_config(vocabulary: int, itemsize: int, arch: str) -> dict[str, int]:
    """Two 128-bit loads and stores of each thread in flight."""
    return row_config(vocabulary, 8192 // itemsize, arch)


def token_stats_backward(
    logits: Tensor, labels: Tensor, stats: RowStats, upstream: Upstream, ignore_index: int, scaling: Scaling
) -> Tensor:
    """The gradient of the logits, contiguous, in their dtype.

    Where the rows of the logits and of the contiguous gradient lie differently within 16 bytes (a shifted view of an
    odd vocabulary), the stores keep their 128 bits and the loads go element by element.
    """
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    launch(logits, grad, labels, stats, upstream, ignore_index, scaling)
    return grad


def token_stats_backward_(
    logits: Tensor, labels: Tensor, stats: RowStats, upstream: Upstream, ignore_index: int, scaling: Scaling
) -> None:
    """The same, written over the logits."""
    launch(logits, logits, labels, stats, upstream, ignore_index, scaling)


def same_lead(logits: Tensor, grad: Tensor, rows: Rows, grad_rows: Rows) -> bool:
    """Whether each row of `logits` and `grad` begins at the same place within its 16 bytes."""
    pairs = zip(logits.shape[:2], logits.stride()[:2], grad.stride()[:2], strict=True)
    return (
        rows.vector == grad_rows.vector
        and rows.shift == grad_rows.shift
        and all(size == 1 or (ours - theirs) % rows.vector == 0 for size, ours, theirs in pairs)
    )


def launch(
    logits: Tensor,
    grad: Tensor,
    labels: Tensor,
    stats: RowStats,
    upstream: Upstream,
    ignore_index: int,
    scaling: Scaling,
) -> None:
    """Write the gradient of `logits` into `grad`, which may be the same memory."""
    if grad.numel() == 0:
        return
    vocabulary = logits.shape[-1]
    if vocabulary == 1:
        upstream = Upstream(lse=upstream.lse)  # nll and entropy are 0 whatever the logit
    rows, grad_rows = rows_of(logits), rows_of(grad)
    with on_device(logits):
        token_stats_backward_kernel[(labels.numel(),)](
            rows.base,
            grad_rows.base,
            labels,
            *stats,
            *upstream,
            rows.shift,
            grad_rows.shift,
            logits.stride(0),
            logits.stride(1),
            grad.stride(0),
            grad.stride(1),
            labels.shape[1],
            vocabulary,
            ignore_index,
            **scaling_constants(scaling),
            SLOPE=scaling.logit_scale,
            HAS_NLL=upstream.nll is not None,
            HAS_ENTROPY=upstream.entropy is not None,
            HAS_LSE=upstream.lse is not None,
            VECTOR=grad_rows.vector,
            SAME_LEAD=same_lead(logits, grad, rows, grad_rows),
            **backward_config(vocabulary, logits.element_size(), architecture(logits)),
            **FUSED,
        )
