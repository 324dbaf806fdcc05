"""The Error–Uncertainty plane: one point per sample."""

from typing import NamedTuple

import torch
from torch import Tensor

from qtuning_kernels.arguments import FLOATS, check_cu_seqlens, check_same_length, check_vector
from qtuning_kernels.pruning.segments import segment_means


class EUPlane(NamedTuple):
    """A pool of B samples on the Error–Uncertainty plane.

    Attributes:
        ppl: float32 ``[B]``, perplexity; NaN for a sample without trainable tokens.
        entropy: float32 ``[B]``, mean entropy in nats; NaN for a sample without trainable tokens.
        num_tokens: int64 ``[B]``, trainable tokens of each sample.
    """

    ppl: Tensor
    entropy: Tensor
    num_tokens: Tensor


def eu_plane(nll: Tensor, entropy: Tensor, cu_seqlens: Tensor) -> EUPlane:
    """The perplexity and the mean entropy of every sample (eq. 4 and 5).

    Args:
        nll: float32 or float64 ``[T]``, negative log-likelihood in nats of the trainable tokens, sample by
            sample.
        entropy: ``[T]`` of the same dtype, entropy of the predicted distributions in nats.
        cu_seqlens: int32 ``[B+1]``, prefix sum of trainable tokens per sample, from 0 to T.

    Returns:
        `EUPlane`: ``exp(mean nll)``, mean entropy and number of tokens of every sample, means accumulated in
        float64. Above a mean nll of 88.7 the perplexity is infinite; that makes a sample ineligible (decision
        d), as the NaN of a sample without tokens does.

    Raises:
        ValueError: a wrong shape, dtype or device; on a CPU also values of `cu_seqlens` that are no prefix
            sum.
    """
    check_vector("nll", nll, FLOATS)
    check_vector("entropy", entropy, (nll.dtype,), like=nll)
    check_same_length("entropy", entropy, nll.shape[0], "one per token of nll")
    check_cu_seqlens(cu_seqlens, nll)
    values = torch.stack((nll.detach(), entropy.detach()))  # [2, T]
    means = segment_means(values, cu_seqlens)  # [2, B]
    return EUPlane(means[0].exp(), means[1], cu_seqlens.diff().to(torch.int64))
