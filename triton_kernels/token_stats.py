"""`token_stats` on the GPU: nll, entropy, row_max and log_sum of every row in one read of the logits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtuning_kernels.kernels.contract import RowStats, Scaling, stats_dtype
from qtuning_kernels.triton_kernels.launch import FUSED, architecture, on_device, row_config, rows_of
from qtuning_kernels.triton_kernels.row_math import (
    FLOOR,
    finalize,
    load_edge,
    load_words,
    merge,
    online_update,
    scaled,
    scaling_constants,
)


# Reads itemsize bytes per element once, and a label per row; writes 4 statistics per row.
# Identity (r, S, T) = (FLOOR, 0, 0), see row_math.py. Each thread owns LANES neighbouring elements at a time and
# its own partial row, so the loop has no barrier and no shuffle; the block merges once, after it.
@triton.jit
def token_stats_kernel(
    logits_ptr,
    labels_ptr,
    nll_ptr,
    entropy_ptr,
    row_max_ptr,
    log_sum_ptr,
    shift,  # elements between logits_ptr, which divides by 16 bytes, and the first logit
    stride_a,
    stride_c,
    size_c,
    V,
    ignore_index,
    INNER: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    UNIT: tl.constexpr,
    VECTOR: tl.constexpr,  # elements that 16 bytes hold
    LANES: tl.constexpr,  # neighbouring elements that belong to one thread
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    a = row // size_c
    start = shift + a.to(tl.int64) * stride_a + (row - a * size_c).to(tl.int64) * stride_c
    label = tl.load(labels_ptr + row)
    dtype: tl.constexpr = nll_ptr.dtype.element_ty
    if label == ignore_index:
        zero = tl.zeros((), dtype)
        tl.store(nll_ptr + row, zero)
        tl.store(entropy_ptr + row, zero)
        tl.store(row_max_ptr + row, zero)
        tl.store(log_sum_ptr + row, zero)
        return

    # an odd vocabulary or stride leaves rows unaligned: blocks begin at the 16 bytes that hold the row's start
    aligned = start // VECTOR * VECTOR
    lead = (start - aligned).to(tl.int32)
    end = lead + V
    groups: tl.constexpr = BLOCK // LANES
    row_max = tl.full((groups,), FLOOR, dtype)
    sum_exp = tl.zeros((groups,), dtype)
    sum_shifted_exp = tl.zeros((groups,), dtype)

    pairs = tl.maximum(end // BLOCK - 1, 0) // 2
    pair_ptr = logits_ptr + aligned + BLOCK
    for _ in range(pairs):
        tiles = load_pair(pair_ptr, INNER, HAS_SOFTCAP, VECTOR, LANES, BLOCK)
        row_max, sum_exp, sum_shifted_exp = online_update(row_max, sum_exp, sum_shifted_exp, tiles, UNIT)
        pair_ptr += 2 * BLOCK
    # the first block, and those after the last pair
    lanes = tl.arange(0, groups)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    done = 0
    while done < end:
        x, inside = load_edge(logits_ptr + aligned + done, lanes, lead - done, end - done, VECTOR)
        x = tl.where(inside, scaled(x, INNER, HAS_SOFTCAP), float("-inf"))
        row_max, sum_exp, sum_shifted_exp = online_update(row_max, sum_exp, sum_shifted_exp, (x,), UNIT)
        done += BLOCK + (2 * BLOCK * pairs if done == 0 else 0)

    in_range = (label >= 0) & (label < V)
    x_label = tl.load(logits_ptr + start + label, in_range, float("nan"))
    x_label = tl.where(in_range, scaled(x_label, INNER, HAS_SOFTCAP), float("nan"))
    row_max, sum_exp, sum_shifted_exp = merge(row_max, sum_exp, sum_shifted_exp)
    nll, entropy, row_max, log_sum = finalize(row_max, sum_exp, sum_shifted_exp, x_label, V, UNIT)
    tl.store(nll_ptr + row, nll)
    tl.store(entropy_ptr + row, entropy)
    tl.store(row_max_ptr + row, row_max)
    tl.store(log_sum_ptr + row, log_sum)


@triton.jit
def load_pair(
    ptr,
    INNER: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Two blocks that the row fills, as a tuple of scaled tiles whose rows belong to one thread each."""
    groups: tl.constexpr = BLOCK // LANES
    if ptr.dtype.element_ty == tl.bfloat16 and VECTOR == 8:
        words = tl.arange(0, groups)[:, None] * 4 + tl.arange(0, 4)[None, :]
        x0, x1 = load_words(ptr, words)
        x2, x3 = load_words(ptr + BLOCK, words)
        return (
            scaled(x0, INNER, HAS_SOFTCAP),
            scaled(x1, INNER, HAS_SOFTCAP),
            scaled(x2, INNER, HAS_SOFTCAP),
            scaled(x3, INNER, HAS_SOFTCAP),
        )
    else:
        lanes = tl.arange(0, groups)[:, None] * LANES + tl.arange(0, LANES)[None, :]
        return (
            scaled(tl.load(ptr + lanes), INNER, HAS_SOFTCAP),
            scaled(tl.load(ptr + BLOCK + lanes), INNER, HAS_SOFTCAP),
        )


def forward_config(vocabulary: int, itemsize: int, arch: str) -> dict[str, int]:
    """Two 128-bit loads of each thread in flight: a pair of blocks."""
    return {"LANES": 16 // itemsize, **row_config(vocabulary, 4096 // itemsize, arch)}


def token_stats(logits: Tensor, labels: Tensor, ignore_index: int, scaling: Scaling) -> tuple[Tensor, RowStats]:
    """nll, and entropy, row_max and log_sum, per token in nats; 0 where the label is `ignore_index`."""
    nll, *rest = (torch.empty(labels.shape, dtype=stats_dtype(logits.dtype), device=logits.device) for _ in range(4))
    stats = RowStats(*rest)
    if labels.numel() == 0:
        return nll, stats
    vocabulary = logits.shape[-1]
    base, shift, vector = rows_of(logits)
    with on_device(logits):
        token_stats_kernel[(labels.numel(),)](
            base,
            labels,
            nll,
            *stats,
            shift,
            logits.stride(0),
            logits.stride(1),
            labels.shape[1],
            vocabulary,
            ignore_index,
            **scaling_constants(scaling),
            VECTOR=vector,
            **forward_config(vocabulary, logits.element_size(), architecture(logits)),
            **FUSED,
        )
    return nll, stats
