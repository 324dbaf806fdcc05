"""Q-Tuning (arXiv 2509.23873) as a policy, and a variant of it with uncorrelated axes."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qtuning_kernels.pruning.plane import EUPlane, eu_plane
from qtuning_kernels.pruning.policies.protocol import Decision, Policy, PoolStats
from qtuning_kernels.pruning.tokens import prune_tokens
from qtuning_kernels.pruning.triage import triage_samples


@dataclass(frozen=True)
class QTuning(Policy):
    """Q2 with part of its tokens, Q4 whole (Alg. 1). The options are those of `QTuningConfig`.

    In the paper the tokens with high scores go: ``token_order="keep_low"``. The default differs (decision e).
    """

    sample_ratio: float
    token_ratio: float
    neighbor_weight: float = 0.5
    token_order: str = "keep_high"
    neighbor_reduction: str = "sum"
    triage_method: str = "rank"
    source: ClassVar = "arXiv 2509.23873"
    needs: ClassVar = frozenset({"nll", "entropy"})

    def __call__(self, pool: PoolStats) -> Decision:
        plane = self.plane(pool)
        triage = triage_samples(plane.ppl, plane.entropy, self.sample_ratio, method=self.triage_method)
        mask = prune_tokens(
            pool.nll,
            pool.cu_seqlens,
            triage,
            self.token_ratio,
            neighbor_weight=self.neighbor_weight,
            order=self.token_order,
            neighbor_reduction=self.neighbor_reduction,
        )
        return Decision(triage.keep, mask.float(), plane, triage)

    def plane(self, pool: PoolStats) -> EUPlane:
        """Where the samples of the pool lie."""
        return eu_plane(pool.nll, pool.entropy, pool.cu_seqlens)


def ranks(x: Tensor) -> Tensor:
    """float64 ``[n]``: ranks from 0, the mean of their places for tied values."""
    ascending = x.sort().values
    first, last = torch.searchsorted(ascending, x), torch.searchsorted(ascending, x, right=True)
    return (first + last - 1).double() / 2


@dataclass(frozen=True)
class QTuningResidual(QTuning):
    """Q-Tuning on what the perplexity does not say of the entropy.

    The second axis is the residual, in ranks, of a least-squares line through the pool's ranks of perplexity and mean
    entropy: perplexity and entropy of answers are so correlated that hardly a sample lies in Q2 or Q4 (decision h).
    """

    source: ClassVar = "this project"

    def plane(self, pool: PoolStats) -> EUPlane:
        plane = super().plane(pool)
        eligible = plane.ppl.isfinite() & plane.entropy.isfinite()
        x, y = ranks(plane.ppl[eligible]), ranks(plane.entropy[eligible])
        x, y = x - x.mean(), y - y.mean()
        spread = (x * x).sum()
        slope = (x * y).sum() / spread if spread > 0 else 0.0
        residual = torch.full_like(plane.entropy, torch.nan)
        residual[eligible] = (y - slope * x).float()
        return plane._replace(entropy=residual)
