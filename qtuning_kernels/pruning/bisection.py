"""Stage 1 as the paper writes it: bisection for the smallest α that fills the budget (Alg. 1, lines 5–21)."""

import torch
from torch import Tensor

from qtuning_kernels.pruning.rank import ALPHA_MAX_PERCENT, min_max

# 0.49 · 2^-48 is far below the distance between two thresholds of any pool that fits into memory
_ITERATIONS = 48
# in samples: far above the rounding of γ·n in float64, far below the one sample that separates two ranks
_RANK_TOLERANCE = 1e-6


def _quantile(ascending: Tensor, count: Tensor, gamma: Tensor) -> Tensor:
    """The smallest value with at least a fraction `gamma` of the `count` first ones at or below it."""
    rank = (gamma * count - _RANK_TOLERANCE).ceil().long()  # counted from 1
    value = ascending.take((rank - 1).clamp(min=0, max=ascending.shape[0] - 1))
    return torch.where(rank > 0, value, -torch.inf)


def triage_bisect(ppl: Tensor, entropy: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The paper's loop, with the arguments, the results and the decisions of `triage_rank`.

    On pools without tied values it gives the same samples, roles and quadrants. Two things differ: `alpha` is
    the one that the loop ended at, and on tied values a sample that is both high and low counts as high.

    A loop that ends above the budget has a lower end at which Q2 and Q4 were still too few: those samples
    stay, and the ones that came in with the last step are trimmed by the supplement score (decision b).
    """
    size = ppl.shape[0]
    eligible = ppl.isfinite() & entropy.isfinite()
    count = eligible.sum()
    ascending_ppl = ppl.masked_fill(~eligible, torch.inf).sort().values
    ascending_entropy = entropy.masked_fill(~eligible, torch.inf).sort().values

    def quadrants(alpha: Tensor) -> Tensor:
        high_ppl = ppl >= _quantile(ascending_ppl, count, 1 - alpha)
        high_entropy = entropy >= _quantile(ascending_entropy, count, 1 - alpha)
        low_ppl = (ppl <= _quantile(ascending_ppl, count, alpha)) & ~high_ppl
        low_entropy = (entropy <= _quantile(ascending_entropy, count, alpha)) & ~high_entropy
        quadrant = torch.zeros(size, dtype=torch.int8, device=ppl.device)
        errors = (high_ppl, high_ppl, low_ppl, low_ppl)
        uncertainties = (high_entropy, low_entropy, low_entropy, high_entropy)
        for number, error, uncertainty in zip((1, 2, 3, 4), errors, uncertainties, strict=True):
            quadrant = quadrant.masked_fill(eligible & error & uncertainty, number)
        return quadrant

    def corners(quadrant: Tensor) -> Tensor:
        return (quadrant == 2) | (quadrant == 4)

    low = torch.zeros((), dtype=torch.float64, device=ppl.device)
    high = torch.full_like(low, ALPHA_MAX_PERCENT / 100)
    for _ in range(_ITERATIONS):
        middle = (low + high) / 2
        enough = corners(quadrants(middle)).sum() >= k
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)

    quadrant = quadrants(high)
    stage_1 = corners(quadrant)
    settled = stage_1 & corners(quadrants(low))
    ppl_hat, entropy_hat = min_max(ppl, eligible), min_max(entropy, eligible)
    tier = torch.where(settled, 0, torch.where(stage_1, 1, torch.where(eligible, 2, 3)))
    by_score = (ppl_hat - entropy_hat).abs().argsort(descending=True, stable=True)
    order = by_score[tier[by_score].argsort(stable=True)]
    index = torch.arange(size, device=ppl.device)
    keep = eligible & (torch.empty_like(index).scatter(0, order, index) < k)
    corner = torch.where(stage_1, quadrant, torch.where(ppl_hat > entropy_hat, 2, 4))
    return (
        quadrant,
        torch.where(keep, corner, 0).to(torch.int8),
        keep,
        torch.where(keep, index, size).sort().values[:k],
        keep & ~stage_1,
        high.float(),
    )
