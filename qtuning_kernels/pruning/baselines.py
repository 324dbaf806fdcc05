"""The selections that the paper compares with, in the types of the policy itself.

Each returns a `Triage` in which a kept sample has role 2, so that `prune_tokens` decides about its tokens
(all of them stay at a ratio of 1). Two token baselines need no function: "PPL" is ``prune_tokens`` with
``neighbor_weight=0``, "reversed PPL" is the same with ``order="keep_high"``.
"""

import torch
from torch import Generator, Tensor

from qtuning_kernels.arguments import FLOATS, check_ratio, check_vector
from qtuning_kernels.pruning.budget import keep_count
from qtuning_kernels.pruning.tokens import prune_tokens
from qtuning_kernels.pruning.triage import Triage

_INTEGERS = (torch.int32, torch.int64)


def _highest(score: Tensor, eligible: Tensor, keep_ratio: float) -> Triage:
    """The k samples with the highest score, ties to the lower index; padded as `triage_samples` pads."""
    check_ratio("keep_ratio", keep_ratio)
    size = score.shape[0]
    k = keep_count(keep_ratio, size)
    index = torch.arange(size, device=score.device)
    order = score.masked_fill(~eligible, -torch.inf).argsort(descending=True, stable=True)
    keep = eligible & (torch.empty_like(index).scatter(0, order, index) < k)
    return Triage(
        quadrant=torch.zeros_like(keep, dtype=torch.int8),
        role=torch.where(keep, 2, 0).to(torch.int8),
        keep=keep,
        kept_index=torch.where(keep, index, size).sort().values[:k],
        supplemented=torch.zeros_like(keep),
        alpha=torch.full((), torch.nan, device=score.device),
    )


def random_samples(num_tokens: Tensor, keep_ratio: float, generator: Generator | None = None) -> Triage:
    """k of the samples that have trainable tokens, each as likely. `num_tokens` is integer ``[B]``."""
    check_vector("num_tokens", num_tokens, _INTEGERS)
    score = torch.rand(num_tokens.shape, generator=generator, device=num_tokens.device)
    return _highest(score, num_tokens > 0, keep_ratio)


def longest_samples(num_tokens: Tensor, keep_ratio: float) -> Triage:
    """The k samples with the most trainable tokens. `num_tokens` is integer ``[B]``."""
    check_vector("num_tokens", num_tokens, _INTEGERS)
    return _highest(num_tokens.double(), num_tokens > 0, keep_ratio)


def entropy_samples(entropy: Tensor, keep_ratio: float) -> Triage:
    """The k samples with the highest mean entropy, in nats ``[B]``; a NaN or an infinity is not eligible."""
    check_vector("entropy", entropy, FLOATS)
    return _highest(entropy, entropy.isfinite(), keep_ratio)


def random_tokens(
    cu_seqlens: Tensor, num_tokens: int, triage: Triage, keep_ratio: float, generator: Generator | None = None
) -> Tensor:
    """As many tokens of each sample as `prune_tokens` keeps, each as likely; bool ``[num_tokens]``."""
    draw = torch.rand(num_tokens, generator=generator, device=cu_seqlens.device)
    return prune_tokens(draw, cu_seqlens, triage, keep_ratio, neighbor_weight=0.0)
