"""The collator whose batches are selection pools."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qtuning_kernels.kernels.contract import IGNORE_INDEX


class PoolCollator:
    """Pads samples on the right and keeps their ids; the batch is the selection pool.

    Args:
        pad_token_id: fills ``input_ids``; no result depends on it.
    """

    def __init__(self, pad_token_id: int = 0) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        def padded(rows: list[Sequence[int]], value: int) -> Tensor:
            tensors = [torch.as_tensor(row, dtype=torch.int64) for row in rows]
            return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

        tokens = [feature["input_ids"] for feature in features]
        batch: dict[str, Any] = {
            "input_ids": padded(tokens, self.pad_token_id),
            "attention_mask": padded([[1] * len(row) for row in tokens], 0),
            "labels": padded([feature["labels"] for feature in features], IGNORE_INDEX),
        }
        if all("sample_id" in feature for feature in features):
            ids = [feature["sample_id"] for feature in features]
            batch["sample_id"] = ids if any(isinstance(x, str) for x in ids) else torch.tensor(list(map(int, ids)))
        return batch
