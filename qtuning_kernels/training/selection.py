"""From the statistics of a pool to the samples and tokens that are trained on, in one process or many."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qtuning_kernels.data.samples import Sample
from qtuning_kernels.models.collectives import gather
from qtuning_kernels.pruning import EUPlane, Triage
from qtuning_kernels.pruning.policies.protocol import NEEDS, Decision, Policy, PoolStats

_PER_SAMPLE = ("quadrant", "role", "keep", "supplemented")  # of a Triage


@dataclass(frozen=True)
class Selection:
    """What a pool keeps, on the host.

    Attributes:
        cu_seqlens: int32 ``[B+1]``.
        keep: bool ``[B]``.
        token_weight: floating ``[T]``, 0 for every token that is not trained on.
        weighted: whether weights other than 0 and 1 may occur.
        plane, triage: of a policy that has them. In a pool shared by several processes these are the entries of this
            one's samples, and `Triage.kept_index` counts in the shared pool.
    """

    cu_seqlens: Tensor
    keep: Tensor
    token_weight: Tensor
    weighted: bool = False
    plane: EUPlane | None = None
    triage: Triage | None = None

    @property
    def token_mask(self) -> Tensor:
        """bool ``[T]``, the tokens that are trained on."""
        return self.token_weight != 0

    def of(self, index: int) -> slice:
        """The tokens of one sample."""
        return slice(int(self.cu_seqlens[index]), int(self.cu_seqlens[index + 1]))

    def keep_of(self, index: int) -> Tensor:
        """bool ``[T(x)]``: the tokens of one sample that are trained on."""
        return self.token_weight[self.of(index)] != 0

    def kept_samples(self, samples: Sequence[Sample], token_mode: str) -> list[Sample]:
        """The kept ones, with the pruned tokens out of the loss (``"mask"``) or the sequence (``"drop"``)."""
        prune = Sample.dropped if token_mode == "drop" else Sample.masked
        kept = [i for i, keep in enumerate(self.keep.tolist()) if keep]
        if self.weighted:
            samples = [replace(sample, weights=self.token_weight[self.of(i)]) for i, sample in enumerate(samples)]
        return [prune(samples[i], self.keep_of(i)) for i in kept]


def select(pools: Sequence[PoolStats], policy: Policy, *, shared: bool = False) -> list[Selection]:
    """What `policy` keeps of each pool.

    Args:
        pools: their statistics.
        policy: decides.
        shared: take the pools of all processes as one (``selection_scope="global"``): every process decides about the
            same pool and takes its own part. What they exchange, once, is a few numbers per trainable token.

    Raises:
        ValueError: the policy's decision is of another shape or dtype, or weighs tokens without saying so.
    """
    if not shared:
        return [_decided(pool, policy, slice(0, len(pool.num_tokens))) for pool in pools]
    of_processes = gather([replace(pool, generator=torch.Generator()) for pool in pools])
    selections = []
    for pool, *parts in zip(pools, *of_processes, strict=True):
        start = sum(len(part.num_tokens) for part in parts[: dist.get_rank()])
        samples = slice(start, start + len(pool.num_tokens))
        selections.append(_decided(replace(_joined(parts), generator=pool.generator), policy, samples))
    return selections


def _decided(pool: PoolStats, policy: Policy, samples: slice) -> Selection:
    """The part of a pool's selection that these samples are."""
    decision = _checked(policy(pool), pool, policy)
    keep = decision.keep & (pool.num_tokens > 0)
    weight = torch.where(pool.per_token(keep), decision.token_weight, 0.0)
    cu_seqlens = pool.cu_seqlens[samples.start : samples.stop + 1]
    plane, triage = decision.plane, decision.triage
    return Selection(
        cu_seqlens - cu_seqlens[0],
        keep[samples],
        weight[int(cu_seqlens[0]) : int(cu_seqlens[-1])],
        policy.weighted,
        plane and EUPlane(*(axis[samples] for axis in plane)),
        triage and triage._replace(**{name: getattr(triage, name)[samples] for name in _PER_SAMPLE}),
    )


def _joined(parts: Sequence[PoolStats]) -> PoolStats:
    """Several pools as one."""
    lengths = torch.cat([part.cu_seqlens.diff() for part in parts])
    there: dict[str, Any] = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in NEEDS
        if getattr(parts[0], name) is not None
    }
    return replace(
        parts[0],
        cu_seqlens=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32),
        sample_ids=[sample_id for part in parts for sample_id in part.sample_ids],
        **there,
    )


def _checked(decision: Decision, pool: PoolStats, policy: Policy) -> Decision:
    size, tokens = len(pool.num_tokens), int(pool.cu_seqlens[-1])
    keep, weight = decision.keep, decision.token_weight
    if keep.dtype != torch.bool or keep.shape != (size,):
        raise ValueError(f"{policy!r} gives keep of {keep.dtype}, {list(keep.shape)}; accepted: bool, [{size}]")
    if not weight.is_floating_point() or weight.shape != (tokens,):
        raise ValueError(
            f"{policy!r} gives token_weight of {weight.dtype}, {list(weight.shape)}; accepted: floating, [{tokens}]"
        )
    if not (weight.isfinite() & (weight >= 0)).all():
        raise ValueError(f"{policy!r} gives a token_weight that is negative or not finite; accepted: 0 and above")
    if not policy.weighted and not ((weight == 0) | (weight == 1)).all():
        raise ValueError(f"{policy!r} gives a token_weight of neither 0 nor 1; accepted: that, or weighted = True")
    return decision
