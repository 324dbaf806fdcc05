"""Stage 1 as a ranking: the closed form of the paper's bisection, without a loop and without waiting for the device."""

import torch
from torch import Tensor

ALPHA_MAX_PERCENT = 49  # the bisection's upper end, α ≤ 0.49


def _axis_keys(x: Tensor, eligible: Tensor, count: Tensor, never: int) -> tuple[Tensor, Tensor]:
    """The high key 2h and the low key 2l+1 of every sample on one axis; `never` where α ≤ 0.49 excludes it.

    Keys order the events of a growing α: "high" happens at α·count ≥ h, "low" just after α·count = l.
    """
    ascending = x.masked_fill(~eligible, torch.inf).sort().values
    higher = count - torch.searchsorted(ascending, x, right=True)  # h
    lower = torch.searchsorted(ascending, x)  # l
    turns_high = eligible & (100 * higher <= ALPHA_MAX_PERCENT * count)
    turns_low = eligible & (lower < higher) & ((100 * lower < ALPHA_MAX_PERCENT * count) | (lower == 0))
    return torch.where(turns_high, 2 * higher, never), torch.where(turns_low, 2 * lower + 1, never)


def min_max(x: Tensor, eligible: Tensor) -> Tensor:
    """Min–max over the eligible samples, float32; 0 everywhere on a constant axis."""
    lowest = x.masked_fill(~eligible, torch.inf).amin()
    span = x.masked_fill(~eligible, -torch.inf).amax() - lowest
    return torch.where(eligible & (span > 0), (x - lowest) / span, 0.0)


def triage_rank(ppl: Tensor, entropy: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Stage 1 as a ranking: the closed form of the bisection (eq. 6; Alg. 1, lines 5–21).

    A sample is eligible if both of its coordinates are finite (decision d). ``n`` is the number of eligible
    samples, and every count, extreme and threshold is over them alone. Per axis ``h`` of them lie above a
    sample and ``l`` below it. Its high key is ``2h`` if ``100h ≤ 49n``, its low key is ``2l+1`` if ``l < h``
    and (``100l < 49n`` or ``l = 0``); otherwise it is infinite. With ``key(Q2) = max(high key of PPL, low
    key of entropy)`` and ``key(Q4) = max(low key of PPL, high key of entropy)``, the smaller one is the
    sample's key and its corner the sample's role. If they are equal, both infinite included, decision c gives
    the role: 2 if ``p̂pl > ênt``, else 4.

    The samples kept are the first ``min(k, n)`` in lexicographic order: eligible first, lower key, higher
    supplement score ``|p̂pl − ênt|``, lower index. ``p̂pl = (ppl − min) / (max − min)`` in float32, each
    operation rounded by itself; 0 on a constant axis; ``ênt`` alike.

    ``κ`` is the k-th smallest finite key. If there are fewer, the pool is short and ``κ`` is the largest key
    that α = 0.49 allows, ``2⌊49n/100⌋ + 1``.

    Args:
        ppl: float32 ``[B]``, B ≥ 1.
        entropy: float32 ``[B]``, nats.
        k: samples to keep, ``1 ≤ k ≤ B``.

    Returns:
        quadrant: int8 ``[B]``, where the sample lies at the final α: its corner, 2 or 4, if its key is ≤ κ;
            else 1 if both high keys are ≤ κ; else 3 if both low keys are; else 0. 0 if it is not eligible. A
            sample that was trimmed at κ keeps its corner here; one that was filled in is outside the corners.
        role: int8 ``[B]``, 2 or 4 for a sample that is kept, 0 for one that is not.
        keep: bool ``[B]``.
        kept_index: int64 ``[k]``, ascending. Entries beyond the number of kept samples stand at the end and
            hold B, out of range on purpose: indexing with one raises.
        supplemented: bool ``[B]``, kept although the key is infinite (decision b).
        alpha: float32 0-d, the α that κ stands for, ``min(κ/(2n), 0.49)``: ``h/n`` itself for a high key, the
            middle of the step that begins behind ``l/n`` for a low one; 0.49 if the pool is short.
    """
    ppl, entropy = ppl.float().contiguous(), entropy.float().contiguous()
    size = ppl.shape[0]
    never = 2 * size + 2  # above every finite key
    index = torch.arange(size, device=ppl.device)
    eligible = ppl.isfinite() & entropy.isfinite()
    count = eligible.sum()  # n

    high_ppl, low_ppl = _axis_keys(ppl, eligible, count, never)
    high_entropy, low_entropy = _axis_keys(entropy, eligible, count, never)
    key_q2 = torch.maximum(high_ppl, low_entropy)
    key_q4 = torch.maximum(low_ppl, high_entropy)
    key = torch.minimum(key_q2, key_q4)

    ppl_hat, entropy_hat = min_max(ppl, eligible), min_max(entropy, eligible)
    score = (ppl_hat - entropy_hat).abs()
    leans_q2 = (key_q2 < key_q4) | ((key_q2 == key_q4) & (ppl_hat > entropy_hat))
    corner = torch.where(leans_q2, 2, 4)

    by_score = score.argsort(descending=True, stable=True)
    sort_key = torch.where(eligible, key, never + 1)[by_score]
    ordered_key, by_key = sort_key.sort(stable=True)
    rank = torch.empty_like(index).scatter(0, by_score[by_key], index)
    keep = eligible & (rank < k)
    kept_index = torch.where(keep, index, size).sort().values[:k]

    last_key = 2 * (ALPHA_MAX_PERCENT * count // 100) + 1
    short = ordered_key[k - 1] > last_key
    kappa = torch.minimum(ordered_key[k - 1], last_key)
    noise = (high_ppl <= kappa) & (high_entropy <= kappa)
    redundant = (low_ppl <= kappa) & (low_entropy <= kappa)
    outside = torch.where(noise, 1, torch.where(redundant, 3, 0))
    quadrant = torch.where(key <= kappa, corner, outside)
    alpha_max = ALPHA_MAX_PERCENT / 100
    alpha = torch.where(short, alpha_max, (kappa.float() / (2 * count).float()).clamp(max=alpha_max))
    return (
        quadrant.to(torch.int8),
        torch.where(keep, corner, 0).to(torch.int8),
        keep,
        kept_index,
        keep & (key == never),
        alpha.float(),
    )
