"""Kept samples dealt out again, so that the processes of a run have about as many tokens each."""

from collections.abc import Sequence
from itertools import chain

import torch.distributed as dist

from qtuning_kernels.data.samples import Sample
from qtuning_kernels.models.collectives import gather


def balance_by_tokens(samples: Sequence[Sample], processes: int) -> list[list[Sample]]:
    """Samples dealt out so that each process gets about as many tokens: longest first, each to the process
    with the least so far, the lowest rank among equals."""
    loads = [0] * processes
    shards: list[list[Sample]] = [[] for _ in range(processes)]
    for sample in sorted(samples, key=lambda s: len(s.trimmed().input_ids), reverse=True):
        least = loads.index(min(loads))
        loads[least] += len(sample.trimmed().input_ids)
        shards[least].append(sample)
    return shards


def redistribute(kept: list[list[Sample]]) -> list[list[Sample]]:
    """This process's share of the samples that all processes keep, pool by pool; only these travel, as token ids."""
    shared = [list(chain(*parts)) for parts in zip(*gather(kept), strict=True)]
    return [balance_by_tokens(pool, dist.get_world_size())[dist.get_rank()] for pool in shared]
