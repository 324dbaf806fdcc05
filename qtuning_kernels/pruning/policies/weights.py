"""Weights of the tokens' loss, from the training forward itself: nothing is scored, nothing pruned."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qtuning_kernels.arguments import check_interval
from qtuning_kernels.config import setting
from qtuning_kernels.pruning.policies.baselines import Full


@dataclass(frozen=True)
class BeyondLL(Full):
    """Weight ``p^exponent``: the gradient is that of the loss ``(1 − p^exponent) / exponent`` (decision o)."""

    exponent: float = setting(10.0, check_interval, 0.0, float("inf"))
    source: ClassVar = "arXiv 2510.00526"
    weighted: ClassVar = True

    def loss_weight(self, nll: Tensor, entropy: Tensor) -> Tensor:
        return (-self.exponent * nll.detach()).exp().masked_fill(~nll.isfinite(), 0.0)


@dataclass(frozen=True)
class DFT(Full):
    """Weight ``p`` of the label, without a gradient through it (decision o)."""

    source: ClassVar = "arXiv 2508.05629"
    weighted: ClassVar = True

    def loss_weight(self, nll: Tensor, entropy: Tensor) -> Tensor:
        return BeyondLL(1.0).loss_weight(nll, entropy)


@dataclass(frozen=True)
class EAFT(Full):
    """Weight ``min(entropy / 3, 1)^exponent`` (eq. 2 and 3, decision p)."""

    exponent: float = setting(1.0, check_interval, 0.0, float("inf"))
    source: ClassVar = "arXiv 2601.02151"
    weighted: ClassVar = True

    def loss_weight(self, nll: Tensor, entropy: Tensor) -> Tensor:
        # rounding may leave an entropy of 0 a little below it, where a power is NaN
        gate = (entropy.detach() / 3.0).clamp(0.0, 1.0) ** self.exponent
        return gate.masked_fill(~(entropy.isfinite() & nll.isfinite()), 0.0)
