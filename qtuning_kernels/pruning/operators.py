"""The three operators of the policy in plain PyTorch, for every device: segment means, rank triage, token selection.

On GPUs that Triton serves, `triton_kernels` has the same three as kernels, equal to these exactly, ties included.
Nothing here waits for the device: no value is read on the host and no shape depends on data, so all of it also runs on
meta tensors. The letters in the docstrings are the decisions of docs/method.md.
"""

import importlib
import sys
from types import ModuleType

import torch
from torch import Tensor

from qtuning_kernels.kernels.dispatch import backend

ALPHA_MAX_PERCENT = 49  # the bisection's upper end, α ≤ 0.49


def operators_for(device: torch.device) -> ModuleType:
    """The module whose `segment_means`, `triage_rank` and `select_tokens` serve tensors on `device`.

    Under `torch.compile` it is this one, from which the compiler makes kernels of its own.
    """
    if torch.compiler.is_compiling() or device.type == "meta" or backend(device) != "triton":
        return sys.modules[__name__]
    return importlib.import_module("qtuning_kernels.triton_kernels")


def _segment_of(cu_seqlens: Tensor, size: int) -> Tensor:
    """The segment that holds each of `size` positions; B for a position behind the last segment."""
    position = torch.arange(size, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:], position, right=True)  # [size]


def segment_means(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The mean of every segment of every row (eq. 4 and 5 before the exponential).

    Args:
        values: float32 or float64 ``[C, T]``.
        cu_seqlens: int32 ``[B+1]``, non-decreasing from 0 to T.

    Returns:
        float32 ``[C, B]``: the float64 sum, divided in float64, then rounded. NaN for an empty segment. A NaN
        or an infinity stays within its own segment.
    """
    rows, size = values.shape
    segments = cu_seqlens.shape[0] - 1
    sums = values.new_zeros((rows, segments + 1), dtype=torch.float64)
    sums = sums.index_add(1, _segment_of(cu_seqlens, size), values.double())
    return (sums[:, :segments] / cu_seqlens.diff()).float()


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


def neighbor_scores(ppl: Tensor, cu_seqlens: Tensor, neighbor_weight: float, neighbor_mean: bool) -> Tensor:
    """float32 ``[T]``, eq. 7 as `select_tokens` states it; arguments as there, T and B at least 1."""
    ppl = ppl.float()
    position = torch.arange(ppl.shape[0], device=ppl.device)
    segment = _segment_of(cu_seqlens, ppl.shape[0]).clamp(max=cu_seqlens.shape[0] - 2)
    before = torch.where(position > cu_seqlens[segment], ppl.roll(1), ppl)
    after = torch.where(position + 1 < cu_seqlens[segment + 1], ppl.roll(-1), ppl)
    around = (before + after) * 0.5 if neighbor_mean else before + after
    return ppl * (1.0 - neighbor_weight) + around * neighbor_weight


def select_tokens(
    ppl: Tensor,
    cu_seqlens: Tensor,
    num_keep: Tensor,
    neighbor_weight: float,
    keep_high: bool,
    neighbor_mean: bool,
) -> Tensor:
    """Stage 2: the tokens of each segment with the lowest neighbour score (eq. 7; decisions e to g).

    The score is ``(a · p[i]) + (w · (p[i−1] + p[i+1]))``, or ``(a · p[i]) + (w · ((p[i−1] + p[i+1]) · 0.5))``
    with `neighbor_mean`, in float32, every operation rounded by itself (no fused multiply-add). ``w`` is
    `neighbor_weight` rounded to float32, ``a`` is ``1 − neighbor_weight`` taken in float64, then rounded. A
    neighbour outside the segment is the token itself (decision f). A NaN score counts as +inf.

    Args:
        ppl: float32 ``[T]``, not negative, so clamped that no score overflows.
        cu_seqlens: int32 ``[B+1]``, non-decreasing from 0 to T.
        num_keep: int64 ``[B]``; 0 keeps none, the segment's length (or more) keeps all.
        neighbor_weight: λ in ``[0, 1]``.
        keep_high: keep the highest scores instead.
        neighbor_mean: weigh the neighbours' mean instead of their sum (decision g).

    Returns:
        bool ``[T]``. Among equal scores the earlier token is kept, in both orders.
    """
    size, segments = ppl.shape[0], cu_seqlens.shape[0] - 1
    if size == 0 or segments == 0:
        return torch.zeros_like(ppl, dtype=torch.bool)
    position = torch.arange(size, device=ppl.device)
    segment = _segment_of(cu_seqlens, size)
    inside = segment < segments
    segment = segment.clamp(max=segments - 1)
    start = cu_seqlens[segment]
    score = neighbor_scores(ppl, cu_seqlens, neighbor_weight, neighbor_mean)
    score = score.masked_fill(score.isnan(), torch.inf)

    by_score = score.argsort(descending=keep_high, stable=True)
    order = by_score[segment[by_score].argsort(stable=True)]  # segment by segment, best score first
    chosen = inside & (position - start < num_keep[segment])  # the order has the segments' own layout
    return torch.empty_like(chosen).scatter(0, order, chosen)
