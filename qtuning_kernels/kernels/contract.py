"""The contract of the row operators: what every backend implements, and what it says where it cannot.

A backend is a module with the functions of `RowOperators`. Nothing here knows autograd (`functional.py`), a
matrix product (`linear.py`) or a policy (`pruning/`). Shapes at this level are normal forms that `functional.py` makes:

- ``logits [A, C, V]``, float32, bfloat16, float16 or float64, any strides with a dense last dimension;
- per-token tensors ``[A, C]``, contiguous; statistics and their gradients are of `stats_dtype`;
- labels int32 or int64. A label outside ``[0, V) ∪ {ignore_index}`` gives NaN, never a read out of bounds;
- a token whose label is `ignore_index` has statistics 0 and gradient exactly 0, whatever its logits hold.
"""

from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100  # of labels, as everywhere in PyTorch
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class BackendUnavailableError(RuntimeError):
    """A backend that was asked for cannot serve here; the message says why and how to get it."""


class Scaling(NamedTuple):
    """``z = softcap·tanh(logit_scale·x / softcap)``, or ``logit_scale·x`` where `softcap` is None."""

    logit_scale: float = 1.0
    softcap: float | None = None


class RowStats(NamedTuple):
    """What the backward needs of a row: ``lse = row_max + log_sum``, and entropy, in nats.

    Both parts of lse, since their rounded sum has lost `log_sum` at a large common offset (docs/method.md, "Per
    token"). A row that holds nothing but −inf, or a +inf, has ``row_max`` −inf or +inf and ``log_sum`` 0.
    """

    entropy: Tensor
    row_max: Tensor
    log_sum: Tensor


class Upstream(NamedTuple):
    """Upstream gradients per token; None counts as 0 everywhere."""

    nll: Tensor | None = None
    entropy: Tensor | None = None
    lse: Tensor | None = None


class RowOperators:
    """The three functions of a backend, here of one that is registered with PyTorch under `namespace`."""

    def __init__(self, namespace: str) -> None:
        self._operators = getattr(torch.ops, namespace)

    def token_stats(
        self, logits: Tensor, labels: Tensor, ignore_index: int, scaling: Scaling
    ) -> tuple[Tensor, RowStats]:
        """One read of the logits: nll, and what the backward needs."""
        nll, *stats = self._operators.token_stats(logits, labels, ignore_index, *scaling)
        return nll, RowStats(*stats)

    def token_stats_backward(
        self, logits: Tensor, labels: Tensor, stats: RowStats, upstream: Upstream, ignore_index: int, scaling: Scaling
    ) -> Tensor:
        """The gradient of the logits, in their dtype, contiguous."""
        return self._operators.token_stats_backward(logits, labels, *stats, *upstream, ignore_index, *scaling)

    def token_stats_backward_(
        self, logits: Tensor, labels: Tensor, stats: RowStats, upstream: Upstream, ignore_index: int, scaling: Scaling
    ) -> None:
        """The same, written over the logits. A row whose upstream gradients are all 0 is only written."""
        self._operators.token_stats_backward_(logits, labels, *stats, *upstream, ignore_index, *scaling)


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics: float64 for float64 input, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
