"""A policy of one's own: qtuning train --policy examples.own_policy:Band, or QTuningConfig(policy=Band(most=3.0)).

It keeps the samples that are neither known nor out of reach: those with a mean nll between two bounds.
"""

from dataclasses import dataclass
from typing import ClassVar

from qtuning_kernels.pruning.policies import Decision, Policy, PoolStats


@dataclass(frozen=True)
class Band(Policy):
    least: float = 0.5  # nats
    most: float = 2.5
    needs: ClassVar = frozenset({"nll"})

    def __call__(self, pool: PoolStats) -> Decision:
        nll = pool.mean(pool.nll)  # [B], NaN without tokens, which no bound lets in
        keep = (nll >= self.least) & (nll <= self.most)
        return Decision(keep, pool.per_token(keep).float())
