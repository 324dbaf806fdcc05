"""Stage 1: which samples of a pool are kept."""

from typing import NamedTuple

from torch import Tensor

from qtuning_kernels.arguments import FLOATS, check_choice, check_ratio, check_same_length, check_vector
from qtuning_kernels.config import TRIAGE_METHODS
from qtuning_kernels.pruning.bisection import triage_bisect
from qtuning_kernels.pruning.budget import keep_count
from qtuning_kernels.pruning.rank import triage_rank


class Triage(NamedTuple):
    """The fate of every sample of a pool of B, of which at most k are kept.

    Attributes:
        quadrant: int8 ``[B]``, 1 to 4 as in eq. 6 at the final α, 0 in the middle or ineligible.
        role: int8 ``[B]``, what stage 2 does with a kept sample: 2 prunes its tokens, 4 keeps it whole; 0 is
            a sample that is not kept. It equals the quadrant but for supplemented samples (decision c).
        keep: bool ``[B]``.
        kept_index: int64 ``[k]``, ascending. If fewer than k samples are eligible, the entries beyond them
            are at the end and hold B: cut them off with ``kept_index[:keep.sum()]`` before indexing.
        supplemented: bool ``[B]``, kept by the supplement score because Q2 and Q4 were too few (decision b).
        alpha: float32 0-d, the final α; 0.49 if Q2 and Q4 were too few.
    """

    quadrant: Tensor
    role: Tensor
    keep: Tensor
    kept_index: Tensor
    supplemented: Tensor
    alpha: Tensor


def triage_samples(ppl: Tensor, entropy: Tensor, keep_ratio: float, *, method: str = "rank") -> Triage:
    """Keep the valuable misconceptions and the calibration samples of a pool (eq. 6; Alg. 1, lines 5–21).

    Exactly ``k = max(1, ⌊keep_ratio · B⌋)`` samples are kept, or all that are eligible if these are fewer
    (decisions a, b, d). `k` depends on the shape alone, so nothing waits for the device.

    Args:
        ppl: float32 or float64 ``[B]``, B ≥ 1, perplexity of each sample; rounded to float32 first.
        entropy: ``[B]`` of the same dtype, mean entropy in nats. A sample with a NaN or an infinity in either
            is not eligible.
        keep_ratio: share of the samples to keep, in (0, 1].
        method: ``"rank"``, the closed form; ``"bisect"``, the paper's loop. They
            agree on pools without tied values; on ties the rank form is the definition.

    Returns:
        `Triage`

    Raises:
        ValueError: a wrong shape, dtype, device, ratio or method, or an empty pool.
    """
    check_vector("ppl", ppl, FLOATS)
    check_vector("entropy", entropy, (ppl.dtype,), like=ppl)
    check_same_length("entropy", entropy, ppl.shape[0], "one per sample of ppl")
    if ppl.shape[0] == 0:
        raise ValueError("ppl has 0 entries; accepted: a pool of at least one sample")
    check_ratio("keep_ratio", keep_ratio)
    check_choice("method", method, TRIAGE_METHODS)
    triage = triage_bisect if method == "bisect" else triage_rank
    k = keep_count(keep_ratio, ppl.shape[0])
    ppl, entropy = (x.detach().float().contiguous() for x in (ppl, entropy))
    return Triage(*triage(ppl, entropy, k))
