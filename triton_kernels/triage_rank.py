"""`triage_rank` on the GPU: the closed form of the bisection by counting, without a sort and without the host.

Three kernels, each needing all of the one before: every sample's key from how many lie above and below it, its
rank among the keys, and its place among the kept. Each counts over all pairs: at 4096 samples 17 million
comparisons, which spread over the device take microseconds; a sort would take more launches than that.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtuning_kernels.triton_kernels.launch import INTERPRETED, UNFUSED, on_device

ALPHA_MAX_PERCENT = tl.constexpr(49)


@triton.jit
def finite(x):
    return tl.abs(x) < float("inf")


# Reads 8 bytes per pair of samples (from cache), writes 20 per sample.
@triton.jit
def keys_kernel(
    ppl_ptr,
    entropy_ptr,
    keys_ptr,  # [3, B]: the sample's own, the one at which it is noise, the one at which it is redundant
    score_ptr,
    corner_ptr,
    count_ptr,
    B,
    BLOCK: tl.constexpr,
    OTHERS: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = i < B
    ppl = tl.load(ppl_ptr + i, valid, float("nan"))
    entropy = tl.load(entropy_ptr + i, valid, float("nan"))
    eligible = finite(ppl) & finite(entropy)
    counted = tl.zeros((OTHERS,), tl.int32)
    above_ppl = tl.zeros((BLOCK, OTHERS), tl.int32)
    below_ppl = tl.zeros((BLOCK, OTHERS), tl.int32)
    above_entropy = tl.zeros((BLOCK, OTHERS), tl.int32)
    below_entropy = tl.zeros((BLOCK, OTHERS), tl.int32)
    least_ppl = tl.full((OTHERS,), float("inf"), tl.float32)
    most_ppl = tl.full((OTHERS,), float("-inf"), tl.float32)
    least_entropy = tl.full((OTHERS,), float("inf"), tl.float32)
    most_entropy = tl.full((OTHERS,), float("-inf"), tl.float32)
    for first in range(0, B, OTHERS):
        j = first + tl.arange(0, OTHERS)
        x = tl.load(ppl_ptr + j, j < B, float("nan"))
        y = tl.load(entropy_ptr + j, j < B, float("nan"))
        counts = finite(x) & finite(y)
        counted += counts.to(tl.int32)
        # NaN is neither above nor below
        x = tl.where(counts, x, float("nan"))
        y = tl.where(counts, y, float("nan"))
        above_ppl += (x[None, :] > ppl[:, None]).to(tl.int32)
        below_ppl += (x[None, :] < ppl[:, None]).to(tl.int32)
        above_entropy += (y[None, :] > entropy[:, None]).to(tl.int32)
        below_entropy += (y[None, :] < entropy[:, None]).to(tl.int32)
        least_ppl = tl.minimum(least_ppl, tl.where(counts, x, float("inf")))
        most_ppl = tl.maximum(most_ppl, tl.where(counts, x, float("-inf")))
        least_entropy = tl.minimum(least_entropy, tl.where(counts, y, float("inf")))
        most_entropy = tl.maximum(most_entropy, tl.where(counts, y, float("-inf")))
    n = tl.sum(counted, 0)
    high_ppl, low_ppl = axis_keys(tl.sum(above_ppl, 1), tl.sum(below_ppl, 1), eligible, n, B)
    high_entropy, low_entropy = axis_keys(tl.sum(above_entropy, 1), tl.sum(below_entropy, 1), eligible, n, B)
    key_q2 = tl.maximum(high_ppl, low_entropy)
    key_q4 = tl.maximum(low_ppl, high_entropy)
    ppl_hat = min_max(ppl, eligible, tl.min(least_ppl, 0), tl.max(most_ppl, 0))
    entropy_hat = min_max(entropy, eligible, tl.min(least_entropy, 0), tl.max(most_entropy, 0))
    leans_q2 = (key_q2 < key_q4) | ((key_q2 == key_q4) & (ppl_hat > entropy_hat))
    key = tl.minimum(key_q2, key_q4)
    tl.store(keys_ptr + i, tl.where(eligible, key, 2 * B + 3), valid)
    tl.store(keys_ptr + B + i, tl.maximum(high_ppl, high_entropy), valid)
    tl.store(keys_ptr + 2 * B + i, tl.maximum(low_ppl, low_entropy), valid)
    tl.store(score_ptr + i, tl.abs(ppl_hat - entropy_hat), valid)
    tl.store(corner_ptr + i, tl.where(leans_q2, 2, 4).to(tl.int8), valid)
    tl.store(count_ptr, n)  # every block stores the same


@triton.jit
def axis_keys(higher, lower, eligible, n, B):
    """The high key 2h and the low key 2l+1 of an axis; 2B+2, above every finite key, where α ≤ 0.49 excludes it."""
    turns_high = eligible & (100 * higher <= ALPHA_MAX_PERCENT * n)
    turns_low = eligible & (lower < higher) & ((100 * lower < ALPHA_MAX_PERCENT * n) | (lower == 0))
    return tl.where(turns_high, 2 * higher, 2 * B + 2), tl.where(turns_low, 2 * lower + 1, 2 * B + 2)


@triton.jit
def min_max(x, eligible, least, most):
    """Min–max over the eligible samples, rounded as IEEE division does; 0 on a constant axis."""
    span = tl.zeros_like(x) + (most - least)
    spread = eligible & (span > 0)
    return tl.where(spread, tl.div_rn(tl.where(spread, x - least, 0.0), tl.where(span > 0, span, 1.0)), 0.0)


# Reads 8 bytes per pair of samples (from cache), writes 1 per sample.
@triton.jit
def rank_kernel(keys_ptr, score_ptr, keep_ptr, last_key_ptr, k, B, BLOCK: tl.constexpr, OTHERS: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = i < B
    key = tl.load(keys_ptr + i, valid, 0)[:, None]
    score = tl.load(score_ptr + i, valid, 0.0)[:, None]
    ahead = tl.zeros((BLOCK, OTHERS), tl.int32)
    for first in range(0, B, OTHERS):
        j = first + tl.arange(0, OTHERS)
        other_key = tl.load(keys_ptr + j, j < B, 2147483647)[None, :]
        other_score = tl.load(score_ptr + j, j < B, 0.0)[None, :]
        earlier = (other_score > score) | ((other_score == score) & (j[None, :] < i[:, None]))
        ahead += ((other_key < key) | ((other_key == key) & earlier)).to(tl.int32)
    rank = tl.sum(ahead, 1)
    key = tl.load(keys_ptr + i, valid, 0)
    tl.store(keep_ptr + i, (rank < k) & (key <= 2 * B + 2), valid)
    tl.store(last_key_ptr + i * 0, key, valid & (rank == k - 1))  # one sample holds that rank


# Reads 1 byte per pair of samples (from cache), writes 11 per sample.
@triton.jit
def place_kernel(
    keys_ptr,
    corner_ptr,
    keep_ptr,
    last_key_ptr,
    count_ptr,
    quadrant_ptr,
    role_ptr,
    kept_index_ptr,
    supplemented_ptr,
    alpha_ptr,
    B,
    BLOCK: tl.constexpr,
    OTHERS: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = i < B
    keep = tl.load(keep_ptr + i, valid, 0) != 0
    kept_before = tl.zeros((BLOCK, OTHERS), tl.int32)
    for first in range(0, B, OTHERS):
        j = first + tl.arange(0, OTHERS)
        other = tl.load(keep_ptr + j, j < B, 0) != 0
        kept_before += (other[None, :] & (j[None, :] < i[:, None])).to(tl.int32)
    tl.store(kept_index_ptr + tl.sum(kept_before, 1), i.to(tl.int64), valid & keep)

    n = tl.load(count_ptr)
    ordered = tl.load(last_key_ptr)
    alpha_last = 2 * (ALPHA_MAX_PERCENT * n // 100) + 1  # the largest key that α = 0.49 allows
    kappa = tl.minimum(ordered, alpha_last)
    key = tl.load(keys_ptr + i, valid, 0)
    corner = tl.load(corner_ptr + i, valid, 0)
    outside = tl.where(tl.load(keys_ptr + 2 * B + i, valid, 0) <= kappa, 3, 0)
    outside = tl.where(tl.load(keys_ptr + B + i, valid, 0) <= kappa, 1, outside)
    tl.store(quadrant_ptr + i, tl.where(key <= kappa, corner, outside).to(tl.int8), valid)
    tl.store(role_ptr + i, tl.where(keep, corner, 0).to(tl.int8), valid)
    tl.store(supplemented_ptr + i, keep & (key == 2 * B + 2), valid)
    reached = tl.div_rn(kappa.to(tl.float32), tl.maximum(2 * n, 1).to(tl.float32))
    alpha = tl.where(ordered > alpha_last, 0.49, tl.minimum(reached, 0.49))
    tl.store(alpha_ptr, alpha)  # every block stores the same


def pair_config(size: int) -> dict[str, int]:
    """Samples of a block and others at a time: small blocks, so that a pool of 4096 still makes 256 of them; the
    interpreter, which pays per block, takes them all at once."""
    if INTERPRETED:
        block = min(512, max(16, triton.next_power_of_2(size)))
        return {"BLOCK": block, "OTHERS": block}
    return {"BLOCK": 16, "OTHERS": 128, "num_warps": 4}


def triage_rank(ppl: Tensor, entropy: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Stage 1 as a ranking: quadrant, role, keep, kept_index, supplemented, alpha."""
    ppl, entropy = ppl.float().contiguous(), entropy.float().contiguous()
    size, device = ppl.shape[0], ppl.device
    quadrant, role, corner = (torch.empty(size, dtype=torch.int8, device=device) for _ in range(3))
    keep, supplemented = (torch.empty(size, dtype=torch.bool, device=device) for _ in range(2))
    keys = torch.empty((3, size), dtype=torch.int32, device=device)
    score = torch.empty(size, dtype=torch.float32, device=device)
    last_key, count = (torch.empty(1, dtype=torch.int32, device=device) for _ in range(2))
    kept_index = torch.full((k,), size, dtype=torch.int64, device=device)
    alpha = torch.empty((), dtype=torch.float32, device=device)
    config = pair_config(size)
    grid = (triton.cdiv(size, config["BLOCK"]),)
    with on_device(ppl):
        keys_kernel[grid](ppl, entropy, keys, score, corner, count, size, **config, **UNFUSED)
        rank_kernel[grid](keys, score, keep, last_key, k, size, **config, **UNFUSED)
        place_kernel[grid](
            keys,
            corner,
            keep,
            last_key,
            count,
            quadrant,
            role,
            kept_index,
            supplemented,
            alpha,
            size,
            **config,
            **UNFUSED,
        )
    return quadrant, role, keep, kept_index, supplemented, alpha
