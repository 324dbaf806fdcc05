"""Micro-batches of samples under a token budget."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qtuning_kernels.data.samples import Sample, cu_seqlens_of

MIN_FILL = 0.9  # on a CPU a row that is emptier than this costs more than a group of its own


class MicroBatch(NamedTuple):
    """What one forward reads, and where its head runs.

    input_ids ``[b, L]``; position_ids ``[1, L]`` if samples are packed, else None; rows ``[n]``, indices
    into the flattened hidden states that predict a trainable token; labels ``[n]``; token_index ``[n]``, the place
    of each of these tokens in the flattened tokens of the samples as they were passed; weights ``[n]``, what they
    count, None where samples have no weights.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    rows: Tensor
    labels: Tensor
    token_index: Tensor
    weights: Tensor | None = None

    def to(self, device: torch.device | str) -> "MicroBatch":
        """On a device; the host does not wait for it, which takes memory that stays where it is."""
        pins = torch.device(device).type == "cuda"
        return MicroBatch._make(
            x if x is None else (x.pin_memory() if pins and x.is_cpu else x).to(device, non_blocking=True) for x in self
        )


def micro_batches(samples: Sequence[Sample], token_budget: int, layout: str = "grouped") -> list[MicroBatch]:
    """Samples in groups, each of at most `token_budget` tokens, padding included.

    Trailing tokens that predict nothing are cut, and samples without a label are left out. ``"grouped"`` puts
    samples of similar length into rows, ``"padded"`` of any; no mask is needed: padding is on the right and attention
    causal. ``"packed"`` lays them end to end in one row with position ids that start again, from which the model makes
    its attention block-diagonal. A sample longer than the budget goes alone.
    """
    starts = cu_seqlens_of(samples).tolist()
    order = [i for i, s in enumerate(samples) if len(s.label_positions)]
    short = {i: samples[i].trimmed() for i in order}
    order.sort(key=lambda i: len(short[i].input_ids), reverse=True)
    groups: list[list[int]] = []
    used = width = 0  # of the last group: its tokens as the layout counts them, and its longest sample
    for i in order:
        length = len(short[i].input_ids)
        cost = length if layout == "packed" else width
        similar = layout != "grouped" or length >= MIN_FILL * width
        if groups and used + cost <= token_budget and similar:
            groups[-1].append(i)
            used += cost
        else:
            groups.append([i])
            used = width = length
    build = _packed if layout == "packed" else _padded
    return [build([short[i] for i in group], [starts[i] for i in group]) for group in groups]


def _flat(
    samples: list[Sample], row_starts: list[int], token_starts: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    rows = torch.cat([s.label_positions - 1 + start for s, start in zip(samples, row_starts, strict=True)])
    token_index = torch.cat(
        [torch.arange(start, start + len(s.label_positions)) for s, start in zip(samples, token_starts, strict=True)]
    )
    weights = [s.weights for s in samples if s.weights is not None]
    return rows, torch.cat([s.labels for s in samples]), token_index, torch.cat(weights) if weights else None


def _padded(samples: list[Sample], token_starts: list[int]) -> MicroBatch:
    input_ids = torch.nn.utils.rnn.pad_sequence([s.input_ids for s in samples], batch_first=True)
    width = input_ids.shape[1]
    return MicroBatch(input_ids, None, *_flat(samples, [i * width for i in range(len(samples))], token_starts))


def _packed(samples: list[Sample], token_starts: list[int]) -> MicroBatch:
    lengths = [len(s.input_ids) for s in samples]
    row_starts = [sum(lengths[:i]) for i in range(len(samples))]
    position_ids = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    input_ids = torch.cat([s.input_ids for s in samples]).unsqueeze(0)
    return MicroBatch(input_ids, position_ids, *_flat(samples, row_starts, token_starts))


def nothing() -> MicroBatch:
    """One token and no label: for a process that has to take part in a forward of the others'."""
    empty = torch.zeros(0, dtype=torch.int64)
    return MicroBatch(torch.zeros(1, 1, dtype=torch.int64), None, empty, empty, empty)
