"""Samples as lists of tokens, on the host."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qtuning_kernels.kernels.contract import IGNORE_INDEX


@dataclass(frozen=True)
class Sample:
    """One sequence on the host, without padding.

    Attributes:
        input_ids: int64 ``[L]``.
        label_positions: int64 ``[T]``, ascending positions of the trainable tokens. A token is predicted from the
            position before it, so position 0 is never one.
        labels: int64 ``[T]``, the tokens to predict there.
        sample_id: stable over epochs and runs.
    """

    input_ids: Tensor
    label_positions: Tensor
    labels: Tensor
    sample_id: int

    def trimmed(self) -> "Sample":
        """Without the tokens after which nothing is predicted: attention is causal, so no result changes."""
        end = int(self.label_positions[-1]) if len(self.label_positions) else 1
        return Sample(self.input_ids[: max(end, 1)], self.label_positions, self.labels, self.sample_id)

    def masked(self, keep: Tensor) -> "Sample":
        """The same sequence with only the label positions that `keep` (bool ``[T]``) marks."""
        return Sample(self.input_ids, self.label_positions[keep], self.labels[keep], self.sample_id)

    def dropped(self, keep: Tensor) -> "Sample":
        """The sequence without its pruned tokens, and only the kept label positions.

        The prompt stays, and so does the last token of each answer (the end of turn), in the sequence if
        not in the loss.
        """
        follows = torch.zeros_like(keep)
        follows[:-1] = self.label_positions[1:] == self.label_positions[:-1] + 1  # the answer goes on behind this token
        present = torch.ones_like(self.input_ids, dtype=torch.bool)
        present[self.label_positions[~keep & follows]] = False
        moved = present.long().cumsum(0) - 1
        return Sample(self.input_ids[present], moved[self.label_positions[keep]], self.labels[keep], self.sample_id)


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
    label_positions = (aligned[1:] != IGNORE_INDEX).nonzero().squeeze(1) + 1
    identity = content_id(tokens.tolist()) if sample_id is None else int(sample_id)
    return Sample(tokens, label_positions, aligned[label_positions], identity)


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


def cu_seqlens_of(samples: Sequence[Sample]) -> Tensor:
    """int32 ``[B+1]``, prefix sum of the trainable tokens per sample."""
    counts = torch.tensor([0, *(len(s.label_positions) for s in samples)])
    return counts.cumsum(0).to(torch.int32)
