"""Vectors over the tokens of a pool, cut into segments: one per sample."""

import torch
from torch import Tensor


def segment_of(cu_seqlens: Tensor, size: int) -> Tensor:
    """The segment that holds each of `size` positions; B for a position behind the last segment."""
    position = torch.arange(size, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:], position, right=True)  # [size]


def segment_means(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The mean of every segment of every row (eq. 4 and 5 before the exponential).

    Args:
        values: float32 or float64 ``[C, T]``.
        cu_seqlens: int32 ``[B+1]``, non-decreasing from 0 to T.

    Returns:
        float32 ``[C, B]``: the float64 sum, divided in float64, then rounded. NaN for an empty segment. A NaN
        or an infinity stays within its own segment.
    """
    rows, size = values.shape
    segments = cu_seqlens.shape[0] - 1
    sums = values.new_zeros((rows, segments + 1), dtype=torch.float64)
    sums = sums.index_add(1, segment_of(cu_seqlens, size), values.double())
    return (sums[:, :segments] / cu_seqlens.diff()).float()
