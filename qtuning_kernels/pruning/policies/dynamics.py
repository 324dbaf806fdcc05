"""Selections of samples by how their loss stands in the pool or fell over the run."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from qtuning_kernels.arguments import check_interval, check_weight
from qtuning_kernels.config import setting
from qtuning_kernels.pruning.policies.baselines import highest
from qtuning_kernels.pruning.policies.protocol import Decision, Policy, PoolStats, whole_samples


@dataclass(frozen=True)
class InfoBatch(Policy):
    """A sample whose mean nll is below the pool's mean of those goes with probability r, else it weighs 1/(1−r).

    Every sample's expected weight is 1, so the loss is unbiased (decision j).

    Args:
        prune_ratio: r, in [0, 1).
        delta: share of the run that is pruned; the steps behind it train on everything.
    """

    prune_ratio: float = setting(0.5, check_interval, 0.0, 1.0)
    delta: float = setting(0.875, check_weight)
    source: ClassVar = "arXiv 2303.04947"
    needs: ClassVar = frozenset({"nll"})
    weighted: ClassVar = True

    def __call__(self, pool: PoolStats) -> Decision:
        nll = pool.mean(pool.nll).double()
        finite = nll.isfinite()
        low = nll < nll[finite].mean()
        if pool.total_steps is not None and pool.step >= self.delta * pool.total_steps:
            low = torch.zeros_like(low)
        stays = torch.rand(nll.shape, generator=pool.generator) >= self.prune_ratio
        weight = torch.where(low, stays / (1 - self.prune_ratio), 1.0).masked_fill(~finite, 0.0)
        return Decision(weight > 0, pool.per_token(weight))


@dataclass(frozen=True)
class TailSFT(Policy):
    """All but the `drop_ratio` of the samples whose mean nll fell most since the run met them (Alg. 1, decision q).

    Args:
        drop_ratio: share of the samples, in [0, 1); of n with finite nlls ``min(round(drop_ratio·n), n − 1)`` at most.
    """

    drop_ratio: float = setting(0.5, check_interval, 0.0, 1.0)
    source: ClassVar = "arXiv 2608.25756"
    needs: ClassVar = frozenset({"nll", "first_nll"})

    def __call__(self, pool: PoolStats) -> Decision:
        rise = pool.mean(pool.nll) - pool.first_nll
        finite = rise.isfinite()
        total = int(finite.sum())
        kept = total - min(round(self.drop_ratio * total), total - 1)
        return whole_samples(pool, highest(rise, finite, kept) | (rise >= 0) & finite)
