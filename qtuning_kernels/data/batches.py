"""A host's batch taken apart into samples, and samples put together into the same kind of batch.

Two kinds are understood: padded rows ``[B, L]``, padding on either side, one sample a row; and padding-free rows
``[1, N]``, samples end to end, told apart by `position_ids` that start again. Columns that follow the tokens or the
samples go with them; a batch that holds anything else is refused, since what it means for a part of the samples is
unknown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qtuning_kernels.data.samples import Sample, to_sample
from qtuning_kernels.kernels.contract import IGNORE_INDEX

# what a padding-free batch says of its boundaries a second time; made again from the samples
_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


class BatchKind(NamedTuple):
    """What a batch looks like, apart from its samples.

    Attributes:
        padding_free: samples end to end in one row.
        padding_side: ``"right"`` or ``"left"``, of padded rows.
        columns: names of the per-token columns in their order, ``input_ids`` and ``labels`` among them.
        fill: what padding holds, by column.
        boundaries: which of the columns that repeat the boundaries there are.
        device: of the tensors.
    """

    padding_free: bool
    padding_side: str
    columns: tuple[str, ...]
    fill: dict[str, int | float | bool]
    boundaries: tuple[str, ...]
    device: torch.device


def take_apart(batch: Mapping[str, Any]) -> tuple[list[Sample], BatchKind]:
    """The samples of a batch on the host, and what it takes to make such a batch again.

    Args:
        batch: ``input_ids`` and ``labels`` (−100 outside the answer), ``[B, L]`` with ``attention_mask`` (absent:
            nothing is padding), or ``[1, N]`` with ``position_ids`` and no mask. ``sample_id`` ``[B]`` names samples
            (absent: a hash of the tokens); ``token_weight``, of `input_ids`' shape, is what each label counts.

    Raises:
        ValueError: a column is missing, has another shape, or is none that can be divided by samples.
    """
    for name in ("input_ids", "labels"):
        if name not in batch:
            raise ValueError(f"the batch has {sorted(batch)}; accepted: tokenised samples, {name!r} among the columns")
    shape = batch["input_ids"].shape
    if len(shape) != 2 or batch["labels"].shape != shape:
        raise ValueError(
            f"input_ids has shape {list(shape)} and labels {list(batch['labels'].shape)}; accepted: [B, L] both"
        )
    tokens, values, boundaries = {}, {}, []
    for name, column in batch.items():
        if name in _BOUNDARIES:
            boundaries.append(name)
        elif isinstance(column, Tensor) and column.shape[:2] == shape and name != "shift_labels":
            tokens[name] = column.cpu()
        elif isinstance(column, (Tensor, list, tuple)) and len(column) == shape[0] and not _is_matrix(column):
            values[name] = column.tolist() if isinstance(column, Tensor) else list(column)
        elif column is not None:
            what = f"shape {list(column.shape)}" if isinstance(column, Tensor) else f"type {type(column).__name__}"
            raise ValueError(
                f"the batch has a column {name!r} of {what}, which cannot be divided by samples; accepted: columns "
                f"with one entry per token, {list(shape)}, or per sample, [{shape[0]}]"
            )
    padding_free = "position_ids" in tokens and "attention_mask" not in tokens
    device = batch["input_ids"].device
    if padding_free:
        samples = _of_row(tokens, batch)
        kind = BatchKind(True, "right", tuple(tokens), {}, tuple(boundaries), device)
        return samples, kind
    if boundaries:
        raise ValueError(f"the batch has {boundaries} beside an attention_mask; accepted: one of the two")
    mask = tokens.get("attention_mask", torch.ones(shape, dtype=torch.int64)).bool()
    samples = []
    for row in range(shape[0]):
        real = mask[row]
        if (real[1:] & ~real[:-1]).sum() + real[:1].sum() > 1:
            raise ValueError(f"attention_mask of row {row} has a hole; accepted: padding on the left or right")
        samples.append(_sample({name: column[row][real] for name, column in tokens.items()}, values, row))
    left = bool((~mask[:, 0]).any())
    fill = {name: column[~mask][0].item() if not mask.all() else 0 for name, column in tokens.items()}
    fill |= {"labels": IGNORE_INDEX}
    return samples, BatchKind(False, "left" if left else "right", tuple(tokens), fill, (), device)


def _is_matrix(column: Any) -> bool:
    return isinstance(column, Tensor) and column.dim() > 1


def _sample(columns: dict[str, Tensor], values: dict[str, list], row: int) -> Sample:
    if "position_ids" in columns and (columns["position_ids"].diff() <= 0).any():
        raise ValueError(
            f"position_ids of row {row} start again beside an attention_mask; accepted: one sample in a padded row, "
            "or a padding-free row without attention_mask"
        )
    own = {name: column[row] for name, column in values.items()}
    weights = columns.pop("token_weight", None)
    sample = to_sample(columns.pop("input_ids"), columns.pop("labels"), own.pop("sample_id", None), columns, own)
    return sample if weights is None else replace(sample, weights=weights[sample.label_positions])


def _of_row(tokens: dict[str, Tensor], batch: Mapping[str, Any]) -> list[Sample]:
    if tokens["input_ids"].shape[0] != 1:
        raise ValueError(
            f"input_ids has shape {list(tokens['input_ids'].shape)} and no attention_mask, but position_ids; accepted: "
            "one padding-free row [1, N]"
        )
    starts = (tokens["position_ids"][0] == 0).nonzero().flatten().tolist()
    given = batch.get("cu_seq_lens_q")
    if given is not None and given.tolist()[:-1] != starts:
        raise ValueError(
            f"position_ids start again at {starts}, cu_seq_lens_q at {given.tolist()[:-1]}; accepted: the same samples"
        )
    ends = [*starts[1:], tokens["input_ids"].shape[1]]
    return [
        _sample({name: column[0, start:end] for name, column in tokens.items()}, {}, 0)
        for start, end in zip(starts, ends, strict=True)
    ]


def put_together(samples: Sequence[Sample], kind: BatchKind) -> dict[str, Any]:
    """A batch of that kind, of these samples; at least one. Tokens after the last label are cut off."""
    samples = [sample.trimmed(with_last_label=True) for sample in samples]
    rows = []
    for sample in samples:
        row = {**sample.columns, "input_ids": sample.input_ids, "labels": sample.aligned_labels()}
        if "token_weight" in kind.columns:
            row["token_weight"] = sample.aligned_weights()
        if kind.padding_free:
            row["position_ids"] = torch.arange(len(sample.input_ids))
        rows.append(row)
    if kind.padding_free:
        batch = {name: torch.cat([row[name] for row in rows])[None] for name in kind.columns}
        batch |= _boundaries([len(sample.input_ids) for sample in samples], kind.boundaries)
    else:
        batch = {name: _padded([row[name] for row in rows], kind.fill[name], kind) for name in kind.columns}
        for name in samples[0].values:
            batch[name] = torch.tensor([sample.values[name] for sample in samples])
    return {name: x.to(kind.device) if isinstance(x, Tensor) else x for name, x in batch.items()}


def _padded(rows: list[Tensor], fill: int | float | bool, kind: BatchKind) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, True, fill, kind.padding_side)


def _boundaries(lengths: list[int], names: Sequence[str]) -> dict[str, Any]:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    longest = max(lengths)
    index = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), torch.tensor(lengths))[None]
    made: dict[str, Any] = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "seq_idx": index}
    made |= {"max_length_q": longest, "max_length_k": longest}
    return {name: made[name] for name in names}
