"""Selections of tokens by their loss, under the current model or against a reference's."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qtuning_kernels.arguments import check_choice, check_interval, check_weight
from qtuning_kernels.config import setting
from qtuning_kernels.pruning.budget import keep_count, keep_counts
from qtuning_kernels.pruning.policies.baselines import SOURCE, Entropy, Full, Longest, Random, highest
from qtuning_kernels.pruning.policies.protocol import Decision, Policy, PoolStats
from qtuning_kernels.pruning.tokens import select_tokens


def tokens_of_finite(pool: PoolStats, statistic: Tensor, mask: Tensor) -> Decision:
    """The tokens that `mask` (bool ``[T]``) marks, in samples all of whose `statistic` is finite (decision i)."""
    mask = mask & pool.per_token(pool.mean(statistic).isfinite())
    return Decision(pool.mean(mask.float()) > 0, mask.float())


@dataclass(frozen=True)
class Ppl(Policy):
    """Of each sample the ``max(1, ⌊token_ratio·n⌋)`` tokens of the lowest perplexity (table 5, decision k).

    Args:
        token_ratio: share of the tokens of each sample, in (0, 1].
        sample_ratio: of `samples`.
        samples: the policy of whole samples that decides first.
    """

    token_ratio: float
    sample_ratio: float
    samples: str = setting("full", check_choice, ("full", "random", "longest", "entropy"))
    source: ClassVar = SOURCE
    needs: ClassVar = frozenset({"nll"})
    keep_high: ClassVar = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "needs", self.needs | self.first().needs)

    def first(self) -> Policy:
        """The policy that chooses the samples."""
        ratio = self.sample_ratio
        named = {"full": Full(), "random": Random(ratio), "longest": Longest(ratio), "entropy": Entropy(ratio)}
        return named[self.samples]

    def __call__(self, pool: PoolStats) -> Decision:
        counts = torch.where(self.first()(pool).keep, keep_counts(self.token_ratio, pool.num_tokens), 0)
        mask = select_tokens(pool.nll, pool.cu_seqlens, counts, 0.0, self.keep_high, False)
        return tokens_of_finite(pool, pool.nll, mask)


@dataclass(frozen=True)
class PplReversed(Ppl):
    """As `Ppl`, of the highest perplexity."""

    keep_high: ClassVar = True


@dataclass(frozen=True)
class Rho1(Policy):
    """The ``max(1, ⌊token_ratio·T⌋)`` tokens of the pool whose nll exceeds the reference's most (decision l).

    Args:
        token_ratio: share of the tokens of the pool, in (0, 1].
    """

    token_ratio: float
    source: ClassVar = "arXiv 2404.07965"
    needs: ClassVar = frozenset({"nll", "reference_nll"})

    def __call__(self, pool: PoolStats) -> Decision:
        excess = pool.nll - pool.reference_nll
        finite = pool.per_token(pool.mean(excess).isfinite())
        return tokens_of_finite(pool, excess, highest(excess, finite, keep_count(self.token_ratio, len(excess))))


@dataclass(frozen=True)
class TokenCleaning(Rho1):
    """The rule of `Rho1`; the reference is the same model, fine-tuned on part of the data (decision m)."""

    source: ClassVar = "arXiv 2502.01968"


@dataclass(frozen=True)
class STM(Policy):
    """The tokens of perplexity ≤ `threshold` under the reference, the model before fine-tuning (decision n)."""

    threshold: float = setting(2.5, check_interval, 1.0, float("inf"))
    source: ClassVar = "arXiv 2501.14315"
    needs: ClassVar = frozenset({"reference_nll"})

    def __call__(self, pool: PoolStats) -> Decision:
        return tokens_of_finite(pool, pool.reference_nll, pool.reference_nll.exp() <= self.threshold)


@dataclass(frozen=True)
class ProFit(Policy):
    """The tokens of probability ≥ `threshold` (eq. 4, decision n)."""

    threshold: float = setting(0.1, check_weight)
    source: ClassVar = "arXiv 2601.09195"
    needs: ClassVar = frozenset({"nll"})

    def __call__(self, pool: PoolStats) -> Decision:
        return tokens_of_finite(pool, pool.nll, (-pool.nll).exp() >= self.threshold)
