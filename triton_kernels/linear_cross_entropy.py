"""`linear_cross_entropy` on the GPU: the weighted loss and its gradients at once, weights known beforehand.

Chunks of rows, since a row's statistics need its whole vocabulary: a chunk's logits are computed once, which makes
its statistics on the way (`linear_token_stats`, from unrounded logits) and stores them; `token_stats_backward_`
turns that buffer into their gradient, and the products with the head and the hidden states read it. For a share ρ
of live rows this costs 6NHV·ρ operations (4NHV·ρ with a frozen head, whose product is left out, and with it the
float32 sums) and 10 bytes of traffic per logit and live row in bfloat16: written, read and written over, read
twice. Recomputing the logits instead, as `linear_token_stats_backward` must, saves 4 of the 10 bytes for 2H more
operations per logit. At an H100's 3.35 TB/s and 800 Tflop/s 4 bytes take the time of 960 operations, so that
storing wins for H above about 480, which is every head in use.

Rows of weight 0 or with an ignored label are compacted away before, without asking the device how many stay
(`gemm.py`). The chunks' number is fixed by N; those behind the live rows end at once.
"""

import torch
import triton
from torch import Tensor

from qtuning_kernels.kernels.dispatch import stats_dtype
from qtuning_kernels.triton_kernels.gemm import column_sums, live_rows, multiply
from qtuning_kernels.triton_kernels.linear_token_stats import linear_token_stats
from qtuning_kernels.triton_kernels.token_stats_backward import launch as launch_backward


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
    rows = hidden.shape[0]
    vocabulary = weight.shape[0]
    dtype = stats_dtype(hidden.dtype)
    needs = [*needs[:2], needs[2] and bias is not None]
    weights = hidden.new_ones(rows, dtype=dtype) if token_weight is None else token_weight.to(dtype)
    if rows == 0:
        grads = (
            torch.zeros_like(x) if need else hidden.new_empty(0)
            for x, need in zip((hidden, weight, bias), needs, strict=True)
        )
        return hidden.new_zeros((), dtype=dtype), *grads

    live = (labels != ignore_index) & (weights != 0)
    index, count = live_rows(live)
    packed, weights = hidden[index], weights[index]
    packed_labels = labels.masked_fill(~live, ignore_index)[index]
    if not any(needs):
        nll = linear_token_stats(packed, weight, bias, packed_labels, ignore_index, logit_scale, softcap, count=count)[
            0
        ]
        return _weighted_sum(weights, nll), *(hidden.new_empty(0) for _ in range(3))

    chunk = chunk_rows(rows, vocabulary, hidden.element_size(), needs[1])
    single = chunk >= rows
    pitch = triton.cdiv(vocabulary, 128) * 128  # rows stay aligned, and tiles need no mask
    buffer = hidden.new_empty((chunk, pitch))
    buffer[:, vocabulary:] = 0
    nll = torch.empty(rows, dtype=dtype, device=hidden.device)
    packed_grad = torch.zeros_like(hidden) if needs[0] else hidden.new_empty(0)
    # the sums over chunks need float32; a single chunk's sums are made in registers
    grad_weight = torch.empty_like(weight, dtype=None if single else dtype) if needs[1] else hidden.new_empty(0)
    grad_bias = torch.empty(vocabulary, dtype=dtype, device=hidden.device) if needs[2] else hidden.new_empty(0)

    for first in range(0, rows, chunk):
        part = slice(first, min(first + chunk, rows))
        here = part.stop - first
        left = (count - first).clamp_(0, here)
        logits = buffer[:here, :vocabulary]
        chunk_labels = packed_labels[part]
        stats = linear_token_stats(
            packed[part],
            weight,
            bias,
            chunk_labels,
            ignore_index,
            logit_scale,
            softcap,
            count=left,
            logits=logits,
        )
        nll[part] = stats[0]
        rows3 = [x.unsqueeze(0) for x in (logits, chunk_labels, *stats[1:])]
        upstream = (weights[part].unsqueeze(0), None, None)
        launch_backward(
            rows3[0], rows3[0], rows3[1], rows3[2:], upstream, ignore_index, logit_scale, softcap, count=left
        )
        if needs[0]:
            multiply(logits, weight, packed_grad[part], left, limit="M", add=False)
        if needs[1]:
            multiply(logits.T, packed[part], grad_weight, left, limit="K", add=first > 0)
        if needs[2]:
            column_sums(logits, grad_bias, left, add=first > 0)
    grad_hidden = torch.empty_like(hidden).index_copy_(0, index, packed_grad) if needs[0] else hidden.new_empty(0)
    return (
        _weighted_sum(weights, nll),
        grad_hidden,
        grad_weight.to(weight.dtype) if needs[1] else hidden.new_empty(0),
        grad_bias.to(bias.dtype) if needs[2] else hidden.new_empty(0),
    )


def _weighted_sum(weights: Tensor, nll: Tensor) -> Tensor:
    return (weights * nll.masked_fill(weights == 0, 0.0)).sum()
