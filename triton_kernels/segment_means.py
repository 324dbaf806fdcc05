"""`segment_means` on the GPU: the coordinates of the error–uncertainty plane, before the exponential."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtuning_kernels.triton_kernels.launch import UNFUSED, on_device


# Reads every value once, writes 4 bytes per segment. A block sums its segment in float64, in a fixed order. Rows and
# segments share one axis of the grid: the others end at 65,535 blocks.
@triton.jit
def segment_means_kernel(values_ptr, cu_seqlens_ptr, means_ptr, stride, segments, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    row = block // segments
    segment = block - row * segments
    start = tl.load(cu_seqlens_ptr + segment).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + segment + 1).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float64)
    row_ptr = values_ptr + row.to(tl.int64) * stride
    for first in range(start, end, BLOCK):
        sums += tl.load(row_ptr + first + lanes, lanes < end - first, 0.0).to(tl.float64)
    mean = tl.sum(sums, 0) / (end - start).to(tl.float64)
    tl.store(means_ptr + block, mean.to(tl.float32))


def segment_means(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The mean of every segment of every row, float32 ``[C, B]``; NaN for an empty segment."""
    rows, segments = values.shape[0], cu_seqlens.shape[0] - 1
    means = torch.empty((rows, segments), dtype=torch.float32, device=values.device)
    if means.numel():
        values = values if values.stride(1) == 1 else values.contiguous()
        with on_device(values):
            segment_means_kernel[(rows * segments,)](
                values, cu_seqlens, means, values.stride(0), segments, BLOCK=512, num_warps=4, **UNFUSED
            )
    return means
