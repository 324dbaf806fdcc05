"""Samples as lists of tokens, and micro-batches of them under a token budget."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100
MIN_FILL = 0.9  # a row of a padded group that is emptier than this costs more than a group of its own


@dataclass(frozen=True)
class Sample:
    """One sequence on the host, without padding.

    Attributes:
        input_ids: int64 ``[L]``.
        targets: int64 ``[T]``, ascending positions of the trainable tokens. A token is predicted from the
            position before it, so position 0 is never a target.
        labels: int64 ``[T]``, the tokens to predict there.
        sample_id: stable over epochs and runs.
    """

    input_ids: Tensor
    targets: Tensor
    labels: Tensor
    sample_id: int

    def trimmed(self) -> "Sample":
        """Without the tokens after which nothing is predicted: attention is causal, so no result changes."""
        end = int(self.targets[-1]) if len(self.targets) else 1
        return Sample(self.input_ids[: max(end, 1)], self.targets, self.labels, self.sample_id)

    def masked(self, keep: Tensor) -> "Sample":
        """The same sequence with only the targets that `keep` (bool ``[T]``) marks."""
        return Sample(self.input_ids, self.targets[keep], self.labels[keep], self.sample_id)

    def dropped(self, keep: Tensor) -> "Sample":
        """The sequence without its pruned tokens, and only the kept targets.

        The prompt stays, and so does the last token of each answer (the end of turn), in the sequence if
        not in the loss.
        """
        follows = torch.zeros_like(keep)
        follows[:-1] = self.targets[1:] == self.targets[:-1] + 1  # the answer goes on behind this token
        present = torch.ones_like(self.input_ids, dtype=torch.bool)
        present[self.targets[~keep & follows]] = False
        moved = present.long().cumsum(0) - 1
        return Sample(self.input_ids[present], moved[self.targets[keep]], self.labels[keep], self.sample_id)


class MicroBatch(NamedTuple):
    """What one forward reads, and where its head runs.

    input_ids ``[b, L]``; position_ids ``[1, L]`` if samples are packed, else None; rows ``[n]``, indices
    into the flattened hidden states that predict a trainable token; labels ``[n]``; slots ``[n]``, the place
    of each of these tokens in the flattened tokens of the samples as they were passed.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    rows: Tensor
    labels: Tensor
    slots: Tensor

    def to(self, device: torch.device | str) -> "MicroBatch":
        return MicroBatch(*(x if x is None else x.to(device, non_blocking=True) for x in self))


def content_id(input_ids: Sequence[int]) -> int:
    """An id for a sample that brings none: 63 bits of a hash of its tokens."""
    digest = hashlib.blake2b(",".join(map(str, input_ids)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def to_sample(input_ids: Iterable[int], labels: Iterable[int], sample_id: int | None = None) -> Sample:
    """A sample from aligned tokens and labels, −100 outside the answer."""
    tokens = torch.as_tensor(input_ids, dtype=torch.int64)
    aligned = torch.as_tensor(labels, dtype=torch.int64)
    if tokens.dim() != 1 or tokens.shape != aligned.shape:
        raise ValueError(
            f"input_ids and labels must be lists of equal length, got {list(tokens.shape)} and {list(aligned.shape)}"
        )
    targets = (aligned[1:] != IGNORE_INDEX).nonzero().squeeze(1) + 1
    identity = content_id(tokens.tolist()) if sample_id is None else int(sample_id)
    return Sample(tokens, targets, aligned[targets], identity)


def unpad(batch: Mapping[str, Any]) -> list[Sample]:
    """The samples of a padded batch, padding on either side.

    Args:
        batch: ``input_ids`` and ``labels`` ``[B, L]``; ``attention_mask`` ``[B, L]`` (absent: nothing is
            padding); ``sample_id`` ``[B]`` (absent: a hash of the tokens).

    Raises:
        ValueError: a tensor is missing or of another shape; an attention mask with a hole.
    """
    for name in ("input_ids", "labels"):
        if name not in batch:
            raise ValueError(f"the batch has no {name!r}, only {sorted(batch)}: pass tokenised samples with labels")
    input_ids, labels = batch["input_ids"].cpu(), batch["labels"].cpu()
    mask = batch.get("attention_mask")
    mask = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.cpu().bool()
    if not input_ids.shape == labels.shape == mask.shape:
        raise ValueError(
            "input_ids, labels and attention_mask must have one shape [B, L], got "
            f"{list(input_ids.shape)}, {list(labels.shape)} and {list(mask.shape)}"
        )
    ids = batch.get("sample_id")
    ids = [None] * len(input_ids) if ids is None else ids.tolist()
    samples = []
    for row, (tokens, row_labels, real) in enumerate(zip(input_ids, labels, mask, strict=True)):
        if (real[1:] & ~real[:-1]).sum() + real[:1].sum() > 1:
            raise ValueError(f"attention_mask of row {row} has a hole; accepted: padding on the left or right")
        samples.append(to_sample(tokens[real], row_labels[real], ids[row]))
    return samples


class PoolCollator:
    """Pads samples on the right and keeps their ids; the batch is the selection pool.

    Args:
        pad_token_id: fills ``input_ids``; no result depends on it.
    """

    def __init__(self, pad_token_id: int = 0) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        def padded(rows: list[Sequence[int]], value: int) -> Tensor:
            tensors = [torch.as_tensor(row, dtype=torch.int64) for row in rows]
            return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

        tokens = [feature["input_ids"] for feature in features]
        batch = {
            "input_ids": padded(tokens, self.pad_token_id),
            "attention_mask": padded([[1] * len(row) for row in tokens], 0),
            "labels": padded([feature["labels"] for feature in features], IGNORE_INDEX),
        }
        if all("sample_id" in feature for feature in features):
            batch["sample_id"] = torch.tensor([int(feature["sample_id"]) for feature in features])
        return batch


def cu_seqlens_of(samples: Sequence[Sample]) -> Tensor:
    """int32 ``[B+1]``, prefix sum of the trainable tokens per sample."""
    counts = torch.tensor([0, *(len(s.targets) for s in samples)])
    return counts.cumsum(0).to(torch.int32)


def micro_batches(samples: Sequence[Sample], token_budget: int, layout: str = "padded") -> list[MicroBatch]:
    """Samples in groups, each of at most `token_budget` tokens, padding included.

    Trailing tokens that predict nothing are cut, and samples without a target are left out. ``"padded"`` puts
    samples of similar length into rows; no mask is needed: padding is on the right and attention causal.
    ``"packed"`` lays it end to end in one row with position ids that start again, from which the model makes
    its attention block-diagonal. A sample longer than the budget goes alone.
    """
    starts = cu_seqlens_of(samples).tolist()
    order = [i for i, s in enumerate(samples) if len(s.targets)]
    short = {i: samples[i].trimmed() for i in order}
    order.sort(key=lambda i: len(short[i].input_ids), reverse=True)
    groups: list[list[int]] = []
    used = width = 0  # of the last group: its tokens as the layout counts them, and its longest sample
    for i in order:
        length = len(short[i].input_ids)
        cost = length if layout == "packed" else width
        similar = layout == "packed" or length >= MIN_FILL * width
        if groups and used + cost <= token_budget and similar:
            groups[-1].append(i)
            used += cost
        else:
            groups.append([i])
            used = width = length
    build = _packed if layout == "packed" else _padded
    return [build([short[i] for i in group], [starts[i] for i in group]) for group in groups]


def _flat(samples: list[Sample], row_starts: list[int], slot_starts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.cat([s.targets - 1 + start for s, start in zip(samples, row_starts, strict=True)])
    slots = torch.cat(
        [torch.arange(start, start + len(s.targets)) for s, start in zip(samples, slot_starts, strict=True)]
    )
    return rows, torch.cat([s.labels for s in samples]), slots


def _padded(samples: list[Sample], slot_starts: list[int]) -> MicroBatch:
    input_ids = torch.nn.utils.rnn.pad_sequence([s.input_ids for s in samples], batch_first=True)
    width = input_ids.shape[1]
    return MicroBatch(input_ids, None, *_flat(samples, [i * width for i in range(len(samples))], slot_starts))


def _packed(samples: list[Sample], slot_starts: list[int]) -> MicroBatch:
    lengths = [len(s.input_ids) for s in samples]
    row_starts = [sum(lengths[:i]) for i in range(len(samples))]
    position_ids = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    input_ids = torch.cat([s.input_ids for s in samples]).unsqueeze(0)
    return MicroBatch(input_ids, position_ids, *_flat(samples, row_starts, slot_starts))
