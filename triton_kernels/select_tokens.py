"""`select_tokens` on the GPU: the exact k-th smallest neighbour score of every segment, and the mask of its tokens."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtuning_kernels.triton_kernels.launch import UNFUSED, on_device

PAIRS = 128  # up to this many tokens, comparing all pairs takes less time than 32 passes


# Reads 12 bytes of ppl per token once, writes and reads 4 bytes of key (from cache: once for all pairs, 33 times for
# the search), writes 1 byte of mask. One block per segment.
# Scores become integers in their order, the k-th smallest is found bit by bit from the top, and of the scores that
# equal it the earliest are kept: exact, and the same on every run. No product is fused with a sum, so that scores
# round as they do in PyTorch.
@triton.jit
def select_tokens_kernel(
    ppl_ptr,
    cu_seqlens_ptr,
    num_keep_ptr,
    keys_ptr,
    keep_ptr,
    OWN: tl.constexpr,
    AROUND: tl.constexpr,
    KEEP_HIGH: tl.constexpr,
    NEIGHBOR_MEAN: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    segment = tl.program_id(0)
    start = tl.load(cu_seqlens_ptr + segment).to(tl.int64)
    size = (tl.load(cu_seqlens_ptr + segment + 1) - start).to(tl.int32)
    wanted = tl.minimum(tl.load(num_keep_ptr + segment), size).to(tl.int32)
    ppl_ptr += start
    keys_ptr += start
    keep_ptr += start
    lanes = tl.arange(0, BLOCK)
    for first in range(0, size, BLOCK):
        token = first + lanes
        inside = token < size
        p = tl.load(ppl_ptr + token, inside, 0.0)
        before = tl.load(ppl_ptr + token - 1, inside & (token > 0), 0.0)
        after = tl.load(ppl_ptr + token + 1, token + 1 < size, 0.0)
        around = tl.where(token > 0, before, p) + tl.where(token + 1 < size, after, p)
        if NEIGHBOR_MEAN:
            around = around * 0.5
        score = p * OWN + around * AROUND
        score = tl.where(score != score, float("inf"), score) + 0.0  # −0 is 0
        bits = score.to(tl.int32, bitcast=True)
        # the integer's order is the score's, negative ones included
        key = tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)
        tl.store(keys_ptr + token, ~key if KEEP_HIGH else key, inside)
    tl.debug_barrier()

    if size <= PAIRS:
        i = tl.arange(0, PAIRS)
        mine = tl.load(keys_ptr + i, i < size, 0)[:, None]
        theirs = tl.load(keys_ptr + i, i < size, 0)[None, :]
        ahead = (theirs < mine) | ((theirs == mine) & (i[None, :] < i[:, None]))
        rank = tl.sum((ahead & (i[None, :] < size)).to(tl.int32), 1)
        tl.store(keep_ptr + i, rank < wanted, i < size)
        return

    threshold = tl.zeros((), tl.uint32)
    for step in range(32):
        candidate = threshold | (tl.full((), 1, tl.uint32) << (31 - step))
        below = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, size, BLOCK):
            inside = first + lanes < size
            key = tl.load(keys_ptr + first + lanes, inside, 0)
            below += (inside & (key < candidate)).to(tl.int32)
        threshold = tl.where(tl.sum(below, 0) < wanted, candidate, threshold)

    below = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, size, BLOCK):
        inside = first + lanes < size
        below += (inside & (tl.load(keys_ptr + first + lanes, inside, 0) < threshold)).to(tl.int32)
    ties_left = wanted - tl.sum(below, 0)
    for first in range(0, size, BLOCK):
        inside = first + lanes < size
        key = tl.load(keys_ptr + first + lanes, inside, 0)
        ties = (inside & (key == threshold)).to(tl.int32)
        keep = (key < threshold) | ((ties > 0) & (tl.cumsum(ties, 0) <= ties_left))
        tl.store(keep_ptr + first + lanes, keep, inside)
        ties_left -= tl.sum(ties, 0)


def select_tokens(
    ppl: Tensor,
    cu_seqlens: Tensor,
    num_keep: Tensor,
    neighbor_weight: float,
    keep_high: bool,
    neighbor_mean: bool,
) -> Tensor:
    """The `num_keep` tokens of each segment with the lowest neighbour score (or the highest), bool ``[T]``."""
    keep = torch.zeros(ppl.shape, dtype=torch.bool, device=ppl.device)
    segments = cu_seqlens.shape[0] - 1
    if ppl.numel() == 0 or segments == 0:
        return keep
    ppl = ppl.float().contiguous()
    keys = torch.empty(ppl.shape, dtype=torch.uint32, device=ppl.device)
    with on_device(ppl):
        select_tokens_kernel[(segments,)](
            ppl,
            cu_seqlens,
            num_keep,
            keys,
            keep,
            OWN=1.0 - neighbor_weight,
            AROUND=neighbor_weight,
            KEEP_HIGH=keep_high,
            NEIGHBOR_MEAN=neighbor_mean,
            PAIRS=PAIRS,
            BLOCK=1024,
            num_warps=8,
            **UNFUSED,
        )
    return keep
