"""`linear_token_stats` on the GPU: the statistics from hidden states, without logits in global memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtuning_kernels.kernels.dispatch import stats_dtype
from qtuning_kernels.triton_kernels.launch import (
    FUSED,
    architecture,
    dot_precision,
    multiprocessors,
    on_device,
    product,
    rounded,
)
from qtuning_kernels.triton_kernels.row_math import FLOOR, finish, fold, merge, scaled, scaling


@triton.jit
def project_tile(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    first_row,
    first_column,
    rows,
    columns,
    H,
    HAS_BIAS: tl.constexpr,
    EVEN_H: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    dtype: tl.constexpr,
):
    """A tile of hidden @ weight.T + bias from its first row and column on, accumulated in `dtype`.

    Beyond the given numbers of rows and columns the tile repeats the last one, so that no load is masked.
    """
    # within a tile 32 bits suffice, and 64-bit addresses would cost twice the registers
    row = tl.minimum(tl.arange(0, BLOCK_N), rows - 1 - first_row)
    column = tl.minimum(tl.arange(0, BLOCK_V), columns - 1 - first_column)
    h = tl.arange(0, BLOCK_H)
    a_ptr = hidden_ptr + tl.cast(first_row, tl.int64) * H
    b_ptr = weight_ptr + tl.cast(first_column, tl.int64) * H
    acc = tl.zeros((BLOCK_N, BLOCK_V), dtype)
    for k in range(0, H, BLOCK_H):
        if EVEN_H:
            a = tl.load(a_ptr + (row[:, None] * H + h[None, :]))
            b = tl.load(b_ptr + (column[None, :] * H + h[:, None]))
        else:
            a = tl.load(a_ptr + (row[:, None] * H + h[None, :]), h[None, :] < H - k, 0.0)
            b = tl.load(b_ptr + (column[None, :] * H + h[:, None]), h[:, None] < H - k, 0.0)
        acc = product(a, b, acc, PRECISION)
        a_ptr += BLOCK_H
        b_ptr += BLOCK_H
    if HAS_BIAS:
        acc += tl.load(bias_ptr + first_column + column).to(dtype)[None, :]
    return acc


@triton.jit
def column_halves(tile):
    """The left and the right half of a tile, as a tuple; registers are renamed, nothing moves."""
    pairs = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
    return tl.split(tl.permute(pairs, (0, 2, 1)))


# Reads hidden and weight as a GEMM does; per row and split it writes 3 partial sums, and the logit at the label
# once: 16·splits/V bytes per logit in float32, against 2 and more where the logits are stored.
# Identity (r, S, T) = (FLOOR, 0, 0). Every split folds its tiles in order and writes its own partial rows, so
# the result does not depend on which block finishes first.
@triton.jit
def linear_token_stats_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    labels_ptr,
    partial_ptr,  # [3, splits, N]
    x_label_ptr,  # [N]
    logits_ptr,  # where a caller wants them too, rounded to their dtype
    count_ptr,  # rows to work on, if fewer than N
    N,
    V,
    H,
    columns_per_split,
    stride,
    INNER: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    HAS_LOGITS: tl.constexpr,
    EVEN_H: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    # neighbouring blocks share the weight's tile, which the cache then holds
    split = tl.program_id(1)
    first_row = tl.program_id(0) * BLOCK_N
    if HAS_COUNT and first_row >= tl.load(count_ptr):
        return
    row = first_row + tl.arange(0, BLOCK_N)
    valid = row < N
    dtype: tl.constexpr = partial_ptr.dtype.element_ty
    label = tl.load(labels_ptr + row, valid, -1)
    label = tl.where((label >= 0) & (label < V), label, -1).to(tl.int32)
    r = tl.full((BLOCK_N,), FLOOR, dtype)
    total = tl.zeros((BLOCK_N,), dtype)
    weighted = tl.zeros((BLOCK_N,), dtype)
    x_label = tl.zeros((BLOCK_N,), dtype)
    first = split * columns_per_split
    last = tl.minimum(first + columns_per_split, V)
    for start in range(first, last, BLOCK_V):
        acc = project_tile(
            hidden_ptr,
            weight_ptr,
            bias_ptr,
            first_row,
            start,
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
        left, right = column_halves(acc)
        quarters = column_halves(left) + column_halves(right)
        for i in tl.static_range(4):
            column = start + i * (BLOCK_V // 4) + tl.arange(0, BLOCK_V // 4)[None, :]
            if HAS_LOGITS:
                out_ptrs = logits_ptr + row.to(tl.int64)[:, None] * stride + column
                tl.store(out_ptrs, rounded(quarters[i], logits_ptr.dtype.element_ty), valid[:, None] & (column < last))
            x = scaled(quarters[i], INNER, HAS_SOFTCAP)
            x_label += tl.sum(tl.where(column == label[:, None], x, 0.0), 1)
            x = tl.where(column < last, x, float("-inf"))
            r, total, weighted = fold(r, total, weighted, (x,), UNIT)
    here = (label >= first) & (label < last)
    tl.store(x_label_ptr + row, x_label, valid & here)
    splits = tl.num_programs(1)
    partial_ptr += split * N + row
    tl.store(partial_ptr, r, valid)
    tl.store(partial_ptr + splits * N, total, valid)
    tl.store(partial_ptr + 2 * splits * N, weighted, valid)


# Per row: reads 3 partial sums of each split, the logit at the label and the label; writes 4 statistics.
@triton.jit
def combine_kernel(
    partial_ptr,
    x_label_ptr,
    labels_ptr,
    nll_ptr,
    entropy_ptr,
    row_max_ptr,
    log_sum_ptr,
    N,
    V,
    splits,
    ignore_index,
    UNIT: tl.constexpr,
    SPLITS: tl.constexpr,  # the next power of two
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = row < N
    split = tl.arange(0, SPLITS)[:, None]
    there = (split < splits) & valid[None, :]
    partial_ptr += split * N + row[None, :]
    r = tl.load(partial_ptr, there, FLOOR)
    total = tl.load(partial_ptr + splits * N, there, 0.0)
    weighted = tl.load(partial_ptr + 2 * splits * N, there, 0.0)
    label = tl.load(labels_ptr + row, valid, 0)
    possible = (label >= 0) & (label < V)
    x_label = tl.load(x_label_ptr + row, valid & possible, 0.0)
    x_label = tl.where(possible, x_label, float("nan"))
    r, total, weighted = merge(r, total, weighted, 0)
    nll, entropy, row_max, log_sum = finish(r, total, weighted, x_label, V, UNIT)
    ignored = label == ignore_index
    tl.store(nll_ptr + row, tl.where(ignored, 0.0, nll), valid)
    tl.store(entropy_ptr + row, tl.where(ignored, 0.0, entropy), valid)
    tl.store(row_max_ptr + row, tl.where(ignored, 0.0, row_max), valid)
    tl.store(log_sum_ptr + row, tl.where(ignored, 0.0, log_sum), valid)


def tile_config(rows: int, size: int, itemsize: int, arch: str) -> dict[str, int]:
    """Tiles of a GEMM from hidden states to logits, whose epilogue works on the accumulators.

    128 × 128 with 8 warps leaves 64 accumulators per thread. From Hopper on, operands come from shared memory and
    the rest fits into 128 registers without a spill, so that two blocks are resident and one's epilogue hides
    behind the other's matrix instructions; a larger tile, alone on its multiprocessor, could not do that. Before,
    operands take registers too, and 200 are needed. Without 16-bit matrix instructions (float32, float64) tiles
    are small for the registers' sake, and with few rows since most of a tile would be padding. The interpreter
    pays per tile, not per element.
    """
    if arch == "interpreter":
        block_n, block_h = (min(cap, max(16, triton.next_power_of_2(n))) for n, cap in ((rows, 64), (size, 128)))
        return {"BLOCK_N": block_n, "BLOCK_V": 1024, "BLOCK_H": block_h}
    if itemsize > 2:
        block_h = 32 if itemsize == 4 else 16
        return {"BLOCK_N": 32, "BLOCK_V": 64, "BLOCK_H": block_h, "num_warps": 4, "num_stages": 2}
    block = 128 if rows > 64 else 64 if rows > 32 else 32
    config = {"BLOCK_N": block, "BLOCK_V": 128, "BLOCK_H": 64, "num_warps": block // 16, "num_stages": 3}
    if arch.startswith("sm_") and block == 128:
        config["maxnreg"] = 200 if arch.startswith("sm_8") else 128
    elif arch.startswith("gfx"):
        config["num_stages"] = 2
    return config


def vocabulary_splits(rows: int, vocabulary: int, block_n: int, block_v: int, multiprocessors: int) -> int:
    """Splits of the vocabulary: enough blocks for four waves of two per multiprocessor, so that the last wave's
    idle share is small; never more than the tiles that there are, nor than the combining kernel takes at once."""
    wanted = triton.cdiv(8 * multiprocessors, triton.cdiv(rows, block_n))
    return max(1, min(wanted, triton.cdiv(vocabulary, block_v), 128))


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    count: Tensor | None = None,
    logits: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`token_stats` of ``hidden @ weight.T + bias``, whose logits never exist outside of registers.

    With `count` (int32 ``[1]``) only that many rows are worked on, and the labels behind must be ignored ones.
    With `logits` (``[N, V]``, dense rows) they are written there too.
    """
    rows, size = hidden.shape
    vocabulary = weight.shape[0]
    dtype = stats_dtype(hidden.dtype)
    stats = [torch.empty(rows, dtype=dtype, device=hidden.device) for _ in range(4)]
    if rows == 0:
        return tuple(stats)
    config = tile_config(rows, size, hidden.element_size(), architecture(hidden))
    if logits is not None:
        config.pop("maxnreg", None)  # the stores' addresses would spill
    block_n, block_v = config["BLOCK_N"], config["BLOCK_V"]
    splits = vocabulary_splits(rows, vocabulary, block_n, block_v, multiprocessors(hidden))
    per_split = triton.cdiv(triton.cdiv(vocabulary, block_v), splits) * block_v
    splits = triton.cdiv(vocabulary, per_split)
    partial = torch.empty((3, splits, rows), dtype=dtype, device=hidden.device)
    x_label = torch.empty(rows, dtype=dtype, device=hidden.device)
    scale = scaling(logit_scale, softcap)
    with on_device(hidden):
        linear_token_stats_kernel[(triton.cdiv(rows, block_n), splits)](
            hidden,
            weight,
            bias,
            labels,
            partial,
            x_label,
            logits,
            count,
            rows,
            vocabulary,
            size,
            per_split,
            0 if logits is None else logits.stride(0),
            **scale,
            HAS_BIAS=bias is not None,
            HAS_COUNT=count is not None,
            HAS_LOGITS=logits is not None,
            EVEN_H=size % config["BLOCK_H"] == 0,
            PRECISION=dot_precision(hidden),
            **config,
            **FUSED,
        )
        combine_kernel[(triton.cdiv(rows, 32),)](
            partial,
            x_label,
            labels,
            *stats,
            rows,
            vocabulary,
            splits,
            ignore_index,
            UNIT=scale["UNIT"],
            SPLITS=triton.next_power_of_2(splits),
            BLOCK=32,
            num_warps=4,
            **FUSED,
        )
    return tuple(stats)
