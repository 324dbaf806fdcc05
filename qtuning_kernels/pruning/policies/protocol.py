"""What a selection policy is given, and what it gives back."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Generator, Tensor

from qtuning_kernels.config import check_settings
from qtuning_kernels.pruning.plane import EUPlane
from qtuning_kernels.pruning.segments import segment_means, segment_of
from qtuning_kernels.pruning.triage import Triage

SCORED = frozenset({"nll", "entropy", "lse", "first_nll"})  # what the scoring pass gives
NEEDS = SCORED | {"reference_nll"}
_ABSENT = cast(Tensor, None)


@dataclass(frozen=True)
class PoolStats:
    """A pool of B samples with T trainable tokens, sample by sample, on the host. What a policy does not need is None.

    Attributes:
        cu_seqlens: int32 ``[B+1]``, prefix sum of trainable tokens per sample, from 0 to T.
        sample_ids: ``[B]``, stable over the run.
        step: optimiser steps before this one.
        total_steps: of the run; None where no run is known.
        generator: on the CPU, seeded by the run's seed, the step and the pool: a resumed run draws the same.
        nll, entropy, lse: float32 ``[T]``, nats, of the current model.
        reference_nll: float32 ``[T]``, nats, of the reference model.
        first_nll: float32 ``[B]``, nats, the sample's mean nll when the run scored it for the first time.
    """

    cu_seqlens: Tensor
    sample_ids: Sequence[int | str] = ()
    step: int = 0
    total_steps: int | None = None
    generator: Generator = field(default_factory=Generator)
    nll: Tensor = _ABSENT
    entropy: Tensor = _ABSENT
    lse: Tensor = _ABSENT
    reference_nll: Tensor = _ABSENT
    first_nll: Tensor = _ABSENT

    @property
    def num_tokens(self) -> Tensor:
        """int64 ``[B]``, trainable tokens of each sample."""
        return self.cu_seqlens.diff().to(torch.int64)

    def mean(self, values: Tensor) -> Tensor:
        """float32 ``[B]``: the mean of ``values [T]`` over each sample, NaN without tokens."""
        return segment_means(values[None], self.cu_seqlens)[0]

    def per_token(self, values: Tensor) -> Tensor:
        """``[T]``: of ``values [B]`` the one of each token's sample."""
        return values[segment_of(self.cu_seqlens, int(self.cu_seqlens[-1]))]


class Decision(NamedTuple):
    """What a policy keeps of a pool.

    Attributes:
        keep: bool ``[B]``. A sample without trainable tokens is never trained on, whatever stands here.
        token_weight: float32 ``[T]``, what a token's nll counts; 0 prunes it. Only a policy that says that it is
            `weighted` may give others than 0 and 1. Tokens of samples that are not kept count as 0.
        plane, triage: what a policy with a plane wants recorded of the samples.
    """

    keep: Tensor
    token_weight: Tensor
    plane: EUPlane | None = None
    triage: Triage | None = None


class Policy:
    """Decides what a step trains on. Subclass it, as a frozen dataclass whose fields are the policy's options.

    A field with the name of a `QTuningConfig` setting (``sample_ratio``, ``token_ratio``) takes that setting and
    its check; others may be checked with `config.setting`.

    Attributes:
        source: where the policy comes from.
        needs: of `NEEDS`, the statistics that it reads; where none comes from scoring, nothing is scored.
        weighted: its loss is Σ weight·nll over the number of trainable tokens of the whole step, pruned ones included,
            so that weights of mean 1 leave the scale alone. Refused in trainers whose loss takes no weights.
        of_pool: whether anything but all is ever kept; a policy of the loss alone (`loss_weight`) says False.
    """

    source: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    weighted: ClassVar[bool] = False
    of_pool: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_settings(vars(self), of=type(self))

    def __call__(self, pool: PoolStats) -> Decision:
        """The decision about one pool; the same for the same pool, whichever process asks."""
        raise NotImplementedError

    def loss_weight(self, nll: Tensor, entropy: Tensor) -> Tensor:
        """Where a policy has it: weights ``[n]`` of the training forward's own tokens, instead of the decision's.

        Args:
            nll, entropy: ``[n]``, nats, detached.
        """
        raise NotImplementedError


def whole_samples(pool: PoolStats, keep: Tensor) -> Decision:
    """The samples that `keep` (bool ``[B]``) marks, with all of their tokens."""
    keep = keep & (pool.num_tokens > 0)
    return Decision(keep, pool.per_token(keep).float())
