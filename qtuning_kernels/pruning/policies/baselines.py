"""The selections of samples that the paper compares with."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qtuning_kernels.arguments import check_ratio
from qtuning_kernels.config import setting
from qtuning_kernels.pruning.budget import keep_count, keep_counts
from qtuning_kernels.pruning.policies.protocol import Decision, Policy, PoolStats, whole_samples
from qtuning_kernels.pruning.tokens import select_tokens

SOURCE = "arXiv 2509.23873"  # Q-Tuning's experiments


def highest(score: Tensor, eligible: Tensor, count: int) -> Tensor:
    """bool ``[n]``: the `count` eligible entries of the highest score, ties to the lower index."""
    order = score.masked_fill(~eligible, -torch.inf).argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter(0, order, torch.arange(len(order)))
    return eligible & (rank < count)


@dataclass(frozen=True)
class Full(Policy):
    """Everything: fine-tuning on full data."""

    of_pool: ClassVar = False

    def __call__(self, pool: PoolStats) -> Decision:
        return whole_samples(pool, torch.ones_like(pool.num_tokens, dtype=torch.bool))


@dataclass(frozen=True)
class Random(Policy):
    """k of the samples that have trainable tokens, each as likely; of their tokens all, or a random share.

    Args:
        sample_ratio: share of the samples, in (0, 1].
        token_share: share of the tokens of each, in (0, 1].
    """

    sample_ratio: float
    token_share: float = setting(1.0, check_ratio)
    source: ClassVar = SOURCE

    def __call__(self, pool: PoolStats) -> Decision:
        tokens = pool.num_tokens
        draw = torch.rand(tokens.shape, generator=pool.generator)
        keep, weight = whole_samples(pool, highest(draw, tokens > 0, keep_count(self.sample_ratio, len(tokens))))[:2]
        if self.token_share < 1:
            draw = torch.rand(weight.shape, generator=pool.generator)
            counts = torch.where(keep, keep_counts(self.token_share, tokens), 0)
            weight = select_tokens(draw, pool.cu_seqlens, counts, 0.0, False, False).float()
        return Decision(keep, weight)


@dataclass(frozen=True)
class Longest(Policy):
    """The k samples with the most trainable tokens.

    Args:
        sample_ratio: share of the samples, in (0, 1].
    """

    sample_ratio: float
    source: ClassVar = SOURCE

    def __call__(self, pool: PoolStats) -> Decision:
        tokens = pool.num_tokens
        return whole_samples(pool, highest(tokens.double(), tokens > 0, keep_count(self.sample_ratio, len(tokens))))


@dataclass(frozen=True)
class Entropy(Policy):
    """The k samples with the highest mean entropy; one that is not finite is not eligible (decision d).

    Args:
        sample_ratio: share of the samples, in (0, 1].
    """

    sample_ratio: float
    source: ClassVar = SOURCE
    needs: ClassVar = frozenset({"entropy"})

    def __call__(self, pool: PoolStats) -> Decision:
        entropy = pool.mean(pool.entropy)
        return whole_samples(pool, highest(entropy, entropy.isfinite(), keep_count(self.sample_ratio, len(entropy))))
