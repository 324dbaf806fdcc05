"""Samples as lists of tokens, on the host."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
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
        columns: what else a batch holds per token, ``[L, ..]`` each.
        values: what else it holds per sample.
        weights: floating ``[T]``, what each label counts in the loss; None: 1.
    """

    input_ids: Tensor
    label_positions: Tensor
    labels: Tensor
    sample_id: int | str
    columns: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    weights: Tensor | None = None

    def trimmed(self, *, with_last_label: bool = False) -> "Sample":
        """Without the tokens after which nothing is predicted: attention is causal, so no result changes.

        The last label's own token goes as well, unless a batch in which labels lie beside their tokens has to hold it.
        """
        end = int(self.label_positions[-1]) + with_last_label if len(self.label_positions) else 1 + with_last_label
        return self._with(slice(0, end), self.label_positions)

    def aligned_labels(self) -> Tensor:
        """int64 ``[L]``: each label beside its token, −100 elsewhere."""
        labels = torch.full_like(self.input_ids, IGNORE_INDEX)
        labels[self.label_positions] = self.labels
        return labels

    def aligned_weights(self) -> Tensor:
        """float32 ``[L]``: the weight of each label beside its token, 0 elsewhere."""
        weights = torch.zeros(len(self.input_ids))
        weights[self.label_positions] = 1.0 if self.weights is None else self.weights.float()
        return weights

    def masked(self, keep: Tensor) -> "Sample":
        """The same sequence with only the label positions that `keep` (bool ``[T]``) marks."""
        weights = None if self.weights is None else self.weights[keep]
        return replace(self, label_positions=self.label_positions[keep], labels=self.labels[keep], weights=weights)

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
        return self.masked(keep)._with(present, moved[self.label_positions[keep]])

    def _with(self, tokens: slice | Tensor, label_positions: Tensor) -> "Sample":
        columns = {name: column[tokens] for name, column in self.columns.items()}
        return replace(self, input_ids=self.input_ids[tokens], label_positions=label_positions, columns=columns)


def content_id(input_ids: Sequence[int]) -> int:
    """An id for a sample that brings none: 63 bits of a hash of its tokens."""
    digest = hashlib.blake2b(",".join(map(str, input_ids)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def to_sample(
    input_ids: Iterable[int],
    labels: Iterable[int],
    sample_id: int | str | None = None,
    columns: dict[str, Tensor] | None = None,
    values: dict[str, Any] | None = None,
) -> Sample:
    """A sample from aligned tokens and labels, −100 outside the answer; without an id, a hash of its tokens."""
    tokens = torch.as_tensor(input_ids, dtype=torch.int64)
    aligned = torch.as_tensor(labels, dtype=torch.int64)
    if tokens.dim() != 1 or tokens.shape != aligned.shape:
        raise ValueError(
            f"input_ids has shape {list(tokens.shape)} and labels {list(aligned.shape)}; accepted: lists of one length"
        )
    label_positions = (aligned[1:] != IGNORE_INDEX).nonzero().squeeze(1) + 1
    identity = content_id(tokens.tolist()) if sample_id is None else sample_id
    return Sample(tokens, label_positions, aligned[label_positions], identity, columns or {}, values or {})


def cu_seqlens_of(samples: Sequence[Sample]) -> Tensor:
    """int32 ``[B+1]``, prefix sum of the trainable tokens per sample."""
    counts = torch.tensor([0, *(len(s.label_positions) for s in samples)])
    return counts.cumsum(0).to(torch.int32)


def without_labels(samples: Sequence[Sample]) -> Sample:
    """The shortest of the samples, for a batch that may not be empty."""
    shortest = min(samples, key=lambda sample: len(sample.input_ids))
    return shortest.masked(torch.zeros_like(shortest.labels, dtype=torch.bool))
