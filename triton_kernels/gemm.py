"""Matrix products whose number of rows is known on the device only.

Rows of weight 0 are compacted away before a product, and how many stay is a number on the device. A vendor's GEMM
takes its shape from the host, which would have to wait for that number. These kernels read it themselves: blocks
beyond it end at once, so that a share ρ of the rows costs a share ρ of the time and nobody waits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtuning_kernels.triton_kernels.launch import FUSED, architecture, dot_precision, on_device, product, rounded


def live_rows(live: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in the order in which work is done on them: the live ones first, each part in its own order.

    Args:
        live: bool ``[N]``.

    Returns:
        index: int64 ``[N]``, a permutation. count: int32 ``[1]``, the number of live rows, on the device.
    """
    return torch.argsort(~live, stable=True), live.sum(dtype=torch.int32).reshape(1)


# Reads A and B as a GEMM does, writes C once (and reads it, to add).
@triton.jit
def gemm_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    count_ptr,
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_cm,
    LIMIT_M: tl.constexpr,  # count limits M, else K
    ADD: tl.constexpr,
    PADDED: tl.constexpr,  # A's dense dimension goes on, with zeros where it is K, to a multiple of the block
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    dtype: tl.constexpr,
):
    # groups of tile rows share columns of B, which the cache then holds
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = program // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    inside = program % (GROUP * tiles_n)
    first_m = (group * GROUP + inside % height) * BLOCK_M
    first_n = inside // height * BLOCK_N

    count = tl.load(count_ptr)
    rows = M
    if LIMIT_M:
        rows = tl.minimum(M, count)
        if first_m >= rows:
            return
    else:
        K = tl.minimum(K, count)

    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    # within a tile 32 bits suffice; a mask on the dense dimension would make loads narrow where A is odd
    row = tl.minimum(m, rows - 1 - first_m) if LIMIT_M else m
    a_ptr += first_m.to(tl.int64) * stride_am
    b_ptr += first_n
    a_offset = row[:, None] * stride_am + k[None, :] * stride_ak
    b_offset = k[:, None] * stride_bk + n[None, :]
    there = n[None, :] < N - first_n
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype)
    for start in range(0, K, BLOCK_K):
        left = K - start
        if not PADDED:
            a = tl.load(a_ptr + a_offset, (k[None, :] < left) & (m[:, None] < M - first_m), 0.0)
        elif LIMIT_M:
            a = tl.load(a_ptr + a_offset)
        else:
            a = tl.load(a_ptr + a_offset, k[None, :] < left, 0.0)
        b = tl.load(b_ptr + b_offset, (k[:, None] < left) & there, 0.0)
        acc = product(a, b, acc, PRECISION)
        a_ptr += tl.cast(stride_ak, tl.int64) * BLOCK_K
        b_ptr += tl.cast(stride_bk, tl.int64) * BLOCK_K
    c_ptrs = c_ptr + (first_m + m).to(tl.int64)[:, None] * stride_cm + (first_n + n)[None, :]
    valid = (m[:, None] < rows - first_m) & (n[None, :] < N - first_n)
    if ADD:
        acc += tl.load(c_ptrs, valid, 0.0)
    tl.store(c_ptrs, rounded(acc, c_ptr.dtype.element_ty), valid)


# Reads every element of the live rows once; writes (and reads, to add) one sum per column.
@triton.jit
def column_sums_kernel(
    x_ptr,
    out_ptr,
    count_ptr,
    rows,
    columns,
    stride,
    ADD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows = tl.minimum(rows, tl.load(count_ptr))
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.arange(0, BLOCK_R)
    valid = column < columns
    sums = tl.zeros((BLOCK_R, BLOCK_C), out_ptr.dtype.element_ty)
    for start in range(0, rows, BLOCK_R):
        there = (row[:, None] < rows - start) & valid[None, :]
        ptrs = x_ptr + (start + row).to(tl.int64)[:, None] * stride + column[None, :]
        sums += tl.load(ptrs, there, 0.0).to(sums.dtype)
    total = tl.sum(sums, 0)
    if ADD:
        total += tl.load(out_ptr + column, valid, 0.0)
    tl.store(out_ptr + column, total, valid)


def gemm_config(m: int, k: int, n: int, itemsize: int, arch: str) -> dict[str, int]:
    """Tiles of the products: the largest that spill nothing; small where no 16-bit matrix instructions help. In the
    interpreter, which pays per tile and per element, as large as the product."""
    if arch == "interpreter":
        blocks = (min(cap, max(16, triton.next_power_of_2(size))) for size, cap in ((m, 1024), (k, 1024), (n, 128)))
        return {**dict(zip(("BLOCK_M", "BLOCK_K", "BLOCK_N"), blocks, strict=True)), "GROUP": 1}
    if itemsize > 2:
        block_k = 32 if itemsize == 4 else 16
        return {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": block_k, "GROUP": 8, "num_warps": 4, "num_stages": 2}
    stages = 2 if arch.startswith("gfx") else 3
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 8, "num_warps": 8, "num_stages": stages}


def multiply(a: Tensor, b: Tensor, out: Tensor, count: Tensor, *, limit: str, add: bool) -> None:
    """out = a @ b, or out += a @ b, over the live rows.

    Args:
        a: ``[M, K]``, dense in K if `limit` is "M", in M if it is "K". Where its other stride is a multiple of the
            block, what lies behind the dense dimension up to the block's end must be readable, and 0 for "M".
        b: ``[K, N]``, dense rows.
        out: ``[M, N]``, dense rows; any floating dtype, sums are float32 (float64 for float64 input).
        count: int32 ``[1]``, the number of live rows; they come first.
        limit: "M" if the rows of `a` (and of `out`) are the tokens: what lies behind the live ones is not written;
            "K" if the inner dimension is: what lies behind is not read.
        add: whether `out` is added to.
    """
    config = gemm_config(*a.shape, b.shape[1], a.element_size(), architecture(a))
    pitch, block = (a.stride(0), config["BLOCK_K"]) if limit == "M" else (a.stride(1), config["BLOCK_M"])
    padded = pitch % block == 0
    grid = triton.cdiv(a.shape[0], config["BLOCK_M"]) * triton.cdiv(b.shape[1], config["BLOCK_N"])
    with on_device(a):
        gemm_kernel[(grid,)](
            a,
            b,
            out,
            count,
            a.shape[0],
            b.shape[1],
            a.shape[1],
            a.stride(0),
            a.stride(1),
            b.stride(0),
            out.stride(0),
            LIMIT_M=limit == "M",
            ADD=add,
            PADDED=padded,
            PRECISION=dot_precision(a),
            dtype=tl.float64 if a.dtype == torch.float64 else tl.float32,
            **config,
            **FUSED,
        )


def column_sums(x: Tensor, out: Tensor, count: Tensor, *, add: bool) -> None:
    """out = the sums of the live rows of x ``[R, C]``, or out += them; `out` float32 or float64 ``[C]``."""
    with on_device(x):
        column_sums_kernel[(triton.cdiv(x.shape[1], 128),)](
            x,
            out,
            count,
            *x.shape,
            x.stride(0),
            ADD=add,
            BLOCK_R=32,
            BLOCK_C=128,
            num_warps=4,
            **FUSED,
        )
