"""From the scores of a pool to the samples and tokens that are trained on, in one process or many."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from qtuning_kernels.config import QTuningConfig
from qtuning_kernels.data.samples import Sample
from qtuning_kernels.models.collectives import gather
from qtuning_kernels.models.scoring import Scores
from qtuning_kernels.pruning import EUPlane, Triage, eu_plane, prune_tokens, triage_samples


@dataclass(frozen=True)
class Selection:
    """What a pool keeps, on the host.

    Attributes:
        plane: per sample, `EUPlane` ``[B]``.
        triage: per sample, `Triage` ``[B]``. Of a pool shared by several processes these are the entries of
            this one's samples, and `kept_index` counts in the shared pool.
        token_mask: bool ``[T]``, the tokens that are trained on.
        cu_seqlens: int32 ``[B+1]``.
    """

    plane: EUPlane
    triage: Triage
    token_mask: Tensor
    cu_seqlens: Tensor

    def keep_of(self, index: int) -> Tensor:
        """bool ``[T(x)]``: the tokens of one sample that are trained on."""
        return self.token_mask[self.cu_seqlens[index] : self.cu_seqlens[index + 1]]

    def kept_samples(self, samples: Sequence[Sample], token_mode: str) -> list[Sample]:
        """The kept ones, with the pruned tokens out of the loss (``"mask"``) or the sequence (``"drop"``)."""
        kept = [i for i, keep in enumerate(self.triage.keep.tolist()) if keep]
        prune = Sample.dropped if token_mode == "drop" else Sample.masked
        return [prune(samples[i], self.keep_of(i)) for i in kept]


def _shared_triage(plane: EUPlane, config: QTuningConfig) -> Triage:
    """Every process triages the pools of all as one, and takes its own part of the same result."""
    parts = gather((plane.ppl.cpu(), plane.entropy.cpu()))
    ppl, entropy = (torch.cat(axis) for axis in zip(*parts, strict=True))
    triage = triage_samples(ppl, entropy, config.sample_ratio, method=config.triage_method)
    rank = dist.get_rank()
    start = sum(len(part[0]) for part in parts[:rank])
    own = slice(start, start + len(plane.ppl))
    fields = triage._asdict()
    sliced = {name: fields[name][own] for name in ("quadrant", "role", "keep", "supplemented")}
    return Triage(**{**fields, **sliced})


def select(scores: Scores, config: QTuningConfig, *, shared: bool = False) -> Selection:
    """Plane, triage and token pruning of one pool (Alg. 1, lines 2–32), then one copy to the host.

    Args:
        scores: of the pool's samples, on any device.
        config: ratios and orders.
        shared: take the pools of all processes as one (``selection_scope="global"``); what they exchange
            is two numbers per sample.
    """
    plane = eu_plane(scores.nll, scores.entropy, scores.cu_seqlens)
    if shared:
        triage = Triage(*(x.to(scores.nll.device) for x in _shared_triage(plane, config)))
    else:
        triage = triage_samples(plane.ppl, plane.entropy, config.sample_ratio, method=config.triage_method)
    mask = prune_tokens(
        scores.nll,
        scores.cu_seqlens,
        triage,
        config.token_ratio,
        neighbor_weight=config.neighbor_weight,
        order=config.token_order,
        neighbor_reduction=config.neighbor_reduction,
    )
    return Selection(
        EUPlane(*(x.cpu() for x in plane)),
        Triage(*(x.cpu() for x in triage)),
        mask.cpu(),
        scores.cu_seqlens.cpu(),
    )
