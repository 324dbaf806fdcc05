"""Stage 2: which tokens of the kept samples are trained on."""

import torch
from torch import Tensor

from qtuning_kernels.arguments import (
    FLOATS,
    check_choice,
    check_cu_seqlens,
    check_ratio,
    check_same_length,
    check_vector,
    check_weight,
)
from qtuning_kernels.config import NEIGHBOR_REDUCTIONS, TOKEN_ORDERS
from qtuning_kernels.pruning.budget import keep_counts
from qtuning_kernels.pruning.segments import segment_of
from qtuning_kernels.pruning.triage import Triage

# a score is at most twice the largest perplexity, and 2·e^88 = 3.3e38 is still below float32's 3.4e38
MAX_NLL = 88.0


def prune_tokens(
    nll: Tensor,
    cu_seqlens: Tensor,
    triage: Triage,
    keep_ratio: float,
    *,
    neighbor_weight: float = 0.5,
    order: str = "keep_high",
    neighbor_reduction: str = "sum",
) -> Tensor:
    """The tokens to train on: part of each Q2 sample, all of each Q4 sample (eq. 7; Alg. 1, lines 22–32).

    Of a kept sample with role 2 and n trainable tokens, the ``max(1, ⌊keep_ratio · n⌋)`` with the highest
    score ``(1−λ) PPL_i + λ (PPL_(i−1) + PPL_(i+1))`` stay, equal scores in favour of the earlier token
    (decisions e to g). ``PPL_i = exp(min(nll_i, 88))``, so that no score overflows float32. The product with
    the ratio is taken in float64 with a relative headroom of 2^-51, so that 0.29 of 100 tokens are 29.

    Args:
        nll: float32 or float64 ``[T]``, negative log-likelihood in nats of the trainable tokens, sample by
            sample.
        cu_seqlens: int32 ``[B+1]``, prefix sum of trainable tokens per sample, from 0 to T.
        triage: the result of `triage_samples` for the same B samples; its `role` decides.
        keep_ratio: share of the tokens of a role-2 sample to keep, in (0, 1].
        neighbor_weight: λ in [0, 1].
        order: ``"keep_high"``, or ``"keep_low"`` scores stay, as in the paper (decision e).
        neighbor_reduction: ``"sum"`` of the two neighbours, or their ``"mean"`` (decision g).

    Returns:
        bool ``[T]``, False for every token of a sample that is not kept.

    Raises:
        ValueError: a wrong shape, dtype, device, ratio, weight or choice; on a CPU also values of
            `cu_seqlens` that are no prefix sum.
    """
    check_vector("nll", nll, FLOATS)
    check_cu_seqlens(cu_seqlens, nll)
    check_vector("triage.role", triage.role, (torch.int8,), like=nll)
    check_same_length("triage.role", triage.role, cu_seqlens.shape[0] - 1, "one per segment of cu_seqlens")
    check_ratio("keep_ratio", keep_ratio)
    check_weight("neighbor_weight", neighbor_weight)
    check_choice("order", order, TOKEN_ORDERS)
    check_choice("neighbor_reduction", neighbor_reduction, NEIGHBOR_REDUCTIONS)

    lengths = cu_seqlens.diff().to(torch.int64)
    whole = torch.where(triage.role == 4, lengths, 0)
    num_keep = torch.where(triage.role == 2, keep_counts(keep_ratio, lengths), whole)  # [B]
    ppl = nll.detach().float().clamp(max=MAX_NLL).exp()
    return select_tokens(
        ppl, cu_seqlens, num_keep, float(neighbor_weight), order == "keep_high", neighbor_reduction == "mean"
    )


def neighbor_scores(ppl: Tensor, cu_seqlens: Tensor, neighbor_weight: float, neighbor_mean: bool) -> Tensor:
    """float32 ``[T]``, eq. 7 as `select_tokens` states it; arguments as there, T and B at least 1."""
    ppl = ppl.float()
    position = torch.arange(ppl.shape[0], device=ppl.device)
    segment = segment_of(cu_seqlens, ppl.shape[0]).clamp(max=cu_seqlens.shape[0] - 2)
    before = torch.where(position > cu_seqlens[segment], ppl.roll(1), ppl)
    after = torch.where(position + 1 < cu_seqlens[segment + 1], ppl.roll(-1), ppl)
    around = (before + after) * 0.5 if neighbor_mean else before + after
    return ppl * (1.0 - neighbor_weight) + around * neighbor_weight


def select_tokens(
    ppl: Tensor,
    cu_seqlens: Tensor,
    num_keep: Tensor,
    neighbor_weight: float,
    keep_high: bool,
    neighbor_mean: bool,
) -> Tensor:
    """Stage 2: the tokens of each segment with the lowest neighbour score (eq. 7; decisions e to g).

    The score is ``(a · p[i]) + (w · (p[i−1] + p[i+1]))``, or ``(a · p[i]) + (w · ((p[i−1] + p[i+1]) · 0.5))``
    with `neighbor_mean`, in float32, every operation rounded by itself (no fused multiply-add). ``w`` is
    `neighbor_weight` rounded to float32, ``a`` is ``1 − neighbor_weight`` taken in float64, then rounded. A
    neighbour outside the segment is the token itself (decision f). A NaN score counts as +inf.

    Args:
        ppl: float32 ``[T]``, not negative, so clamped that no score overflows.
        cu_seqlens: int32 ``[B+1]``, non-decreasing from 0 to T.
        num_keep: int64 ``[B]``; 0 keeps none, the segment's length (or more) keeps all.
        neighbor_weight: λ in ``[0, 1]``.
        keep_high: keep the highest scores instead.
        neighbor_mean: weigh the neighbours' mean instead of their sum (decision g).

    Returns:
        bool ``[T]``. Among equal scores the earlier token is kept, in both orders.
    """
    size, segments = ppl.shape[0], cu_seqlens.shape[0] - 1
    if size == 0 or segments == 0:
        return torch.zeros_like(ppl, dtype=torch.bool)
    position = torch.arange(size, device=ppl.device)
    segment = segment_of(cu_seqlens, size)
    inside = segment < segments
    segment = segment.clamp(max=segments - 1)
    start = cu_seqlens[segment]
    score = neighbor_scores(ppl, cu_seqlens, neighbor_weight, neighbor_mean)
    score = score.masked_fill(score.isnan(), torch.inf)

    by_score = score.argsort(descending=keep_high, stable=True)
    order = by_score[segment[by_score].argsort(stable=True)]  # segment by segment, best score first
    chosen = inside & (position - start < num_keep[segment])  # the order has the segments' own layout
    return torch.empty_like(chosen).scatter(0, order, chosen)
