"""The row operators in plain PyTorch, for any dtype and device: the specification in code.

What the kernels are tested against, and the backend of that name. It follows docs/method.md line by line and
makes no attempt to be fast or small. Shapes as in `contract.py`.
"""

import torch
from torch import Tensor

from qtuning_kernels.kernels.contract import RowStats, Scaling, Upstream, stats_dtype


def _scaled(logits: Tensor, scaling: Scaling) -> Tensor:
    """z in the statistics' dtype."""
    z = logits.to(stats_dtype(logits.dtype)) * scaling.logit_scale
    return z if scaling.softcap is None else scaling.softcap * torch.tanh(z / scaling.softcap)


def _label_column(labels: Tensor, size: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """The label as an index that is always in bounds, and the masks of ignored and of out-of-range labels."""
    labels = labels.long()
    ignored = labels == ignore_index
    out_of_range = ~ignored & ((labels < 0) | (labels >= size))
    return labels.masked_fill(ignored | out_of_range, 0).unsqueeze(-1), ignored, out_of_range


def token_stats(logits: Tensor, labels: Tensor, ignore_index: int, scaling: Scaling) -> tuple[Tensor, RowStats]:
    """nll, and entropy, row_max and log_sum, per token in nats; 0 where the label is `ignore_index`."""
    z = _scaled(logits, scaling)
    column, ignored, out_of_range = _label_column(labels, logits.shape[-1], ignore_index)
    row_max = z.amax(-1)
    shifted = z - row_max.unsqueeze(-1)
    exp = shifted.exp()
    sum_exp = exp.sum(-1)
    sum_shifted_exp = torch.where(exp == 0, 0.0, shifted * exp).sum(-1)  # 0·−inf counts as 0
    log_sum = sum_exp.log()
    nll = log_sum - shifted.gather(-1, column).squeeze(-1)
    entropy = log_sum - sum_shifted_exp / sum_exp
    log_sum = log_sum.masked_fill(row_max.isinf(), 0.0)  # lse is then the maximum itself
    nll = nll.masked_fill(out_of_range, torch.nan)
    nll, *stats = (x.masked_fill(ignored, 0.0) for x in (nll, entropy, row_max, log_sum))
    return nll, RowStats(*stats)


def token_stats_backward(
    logits: Tensor, labels: Tensor, stats: RowStats, upstream: Upstream, ignore_index: int, scaling: Scaling
) -> Tensor:
    """g_nll (p − 1[y]) − g_entropy p (log p + entropy) + g_lse p, times dz/dx.

    A row whose upstream gradients are all 0, or whose label is ignored, is exactly 0 whatever it holds.
    """
    z = _scaled(logits, scaling)
    column, ignored, out_of_range = _label_column(labels, logits.shape[-1], ignore_index)
    zero = torch.zeros_like(stats.entropy)
    g_nll, g_entropy, g_lse = (zero if g is None else g for g in upstream)

    log_p = (z - stats.row_max.unsqueeze(-1)) - stats.log_sum.unsqueeze(-1)
    p = log_p.exp()
    of_entropy = torch.where(p == 0, 0.0, p * (log_p + stats.entropy.unsqueeze(-1)))
    grad = (g_nll + g_lse).unsqueeze(-1) * p - g_entropy.unsqueeze(-1) * of_entropy
    grad = grad.scatter_add(-1, column, -g_nll.unsqueeze(-1))
    if scaling.softcap is not None:
        grad = grad * (1 - (z / scaling.softcap) ** 2)
    grad = (grad * scaling.logit_scale).masked_fill(out_of_range.unsqueeze(-1), torch.nan)
    pruned = ignored | ((g_nll == 0) & (g_entropy == 0) & (g_lse == 0))
    return grad.masked_fill(pruned.unsqueeze(-1), 0.0).to(logits.dtype)


def token_stats_backward_(
    logits: Tensor, labels: Tensor, stats: RowStats, upstream: Upstream, ignore_index: int, scaling: Scaling
) -> None:
    """`token_stats_backward`, written over the logits."""
    logits.copy_(token_stats_backward(logits, labels, stats, upstream, ignore_index, scaling))
