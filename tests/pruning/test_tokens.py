"""Stage 2: hand-worked segments, decisions e to g, the counts, and what no score may do."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qtuning_kernels as qk
from qtuning_kernels.pruning.budget import keep_count, keep_counts
from qtuning_kernels.pruning.tokens import MAX_NLL, select_tokens

from .pools import PROPERTY

INF, NAN = math.inf, math.nan


def triage_of(role):
    """A triage of which only the roles matter, as stage 2 has it."""
    role = torch.tensor(role, dtype=torch.int8)
    keep = role > 0
    none = torch.zeros_like(keep)
    return qk.Triage(role, role, keep, keep.nonzero().flatten(), none, torch.tensor(0.25))


def prefix_sum(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def kept(nll, lengths, role, ratio, *, order="keep_low", **options):
    mask = qk.prune_tokens(torch.as_tensor(nll), prefix_sum(lengths), triage_of(role), ratio, order=order, **options)
    assert mask.dtype == torch.bool
    assert mask.shape == (sum(lengths),)
    return mask.nonzero().flatten().tolist()


# perplexities 2 8 1 4 1: scores at λ = ½ with the missing neighbour replaced by the token itself
#   sum:  (2 + 2+8)/2 = 6   (8 + 2+1)/2 = 5.5   (1 + 8+4)/2 = 6.5   (4 + 1+1)/2 = 3   (1 + 4+1)/2 = 3
#   mean: (2 + 5)/2 = 3.5   (8 + 1.5)/2 = 4.75  (1 + 6)/2 = 3.5     (4 + 1)/2 = 2.5   (1 + 2.5)/2 = 1.75
WORKED = torch.tensor([2.0, 8.0, 1.0, 4.0, 1.0]).log()


@pytest.mark.parametrize(
    ("ratio", "options", "expected"),
    [
        (0.2, {}, [3]),  # 3 and 4 tie: the earlier one
        (0.4, {}, [3, 4]),
        (0.6, {}, [1, 3, 4]),
        (0.99, {}, [0, 1, 3, 4]),
        (1.0, {}, [0, 1, 2, 3, 4]),
        (0.01, {}, [3]),  # never fewer than one
        (0.2, {"order": "keep_high"}, [2]),
        (0.8, {"order": "keep_high"}, [0, 1, 2, 3]),  # ties keep the earlier token in this order too
        (0.2, {"neighbor_reduction": "mean"}, [4]),
        (0.6, {"neighbor_reduction": "mean"}, [0, 3, 4]),
        (0.4, {"neighbor_reduction": "mean", "order": "keep_high"}, [0, 1]),
        (0.4, {"neighbor_weight": 0.0}, [2, 4]),
        (0.4, {"neighbor_weight": 1.0}, [1, 3]),  # 10 3 12 2 5
    ],
)
def test_worked(ratio, options, expected):
    # exp(log p) may be one unit off p, which would break the ties that the example is about
    nll = WORKED.double()
    assert torch.equal(nll.float().exp(), torch.tensor([2.0, 8.0, 1.0, 4.0, 1.0]))
    assert kept(nll, [5], [2], ratio, **options) == expected


def test_neighbours_stay_within_their_sample():
    """Beside a segment boundary stands 1e6, which would cost token 2 its place if it leaked in."""
    nll = torch.tensor([1e6, 1e6, 1.0, 2.0, 3.0, 1e6]).log()
    assert kept(nll, [2, 3, 1], [0, 2, 0], 0.34) == [2]


def test_roles():
    """Q2 is pruned, Q4 whole, the rest gone, empty samples included; a sample of one token survives."""
    nll = torch.zeros(11)
    assert kept(nll, [3, 4, 0, 3, 0, 1], [4, 2, 2, 0, 4, 2], 0.5) == [0, 1, 2, 3, 4, 10]


def test_nothing_kept():
    assert kept(torch.rand(4), [1, 3], [0, 0], 0.5) == []
    assert kept(torch.rand(0), [0, 0], [2, 4], 0.5) == []


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_huge_nll_keeps_its_order(reduction):
    """Without the clamp e^89 is inf, every score beside it is inf too (NaN with λ = 0), and the early tokens
    are kept because they tie."""
    nll = torch.tensor([500.0, 89.0, INF, 1.0, 2.0, 1.0])
    assert kept(nll, [6], [2], 0.5, neighbor_weight=0.0, neighbor_reduction=reduction) == [3, 4, 5]
    assert kept(nll, [6], [2], 0.34, neighbor_weight=0.5, neighbor_reduction=reduction) == [4, 5]


def test_largest_score_is_finite():
    """λ = 1 with the sum: twice the largest perplexity. One nat more would be too much."""
    ppl = torch.tensor([MAX_NLL, MAX_NLL + 1]).exp()
    assert (ppl + ppl).isfinite().tolist() == [True, False]


def test_nan_scores_tie_with_infinite_ones():
    """Scores ∞ ∞ NaN NaN NaN NaN NaN 1.5 1.5: a sort that puts NaN above ∞ would keep token 2 first."""
    ppl = torch.tensor([5.0, INF, INF, NAN, NAN, NAN, 1.0, 1.0, 1.0])
    arguments = (ppl, prefix_sum([9]), torch.tensor([3]), 0.5)
    assert select_tokens(*arguments, True, False).nonzero().flatten().tolist() == [0, 1, 2]
    assert select_tokens(*arguments, False, False).nonzero().flatten().tolist() == [0, 7, 8]


def test_counts_are_those_of_integer_arithmetic():
    """0.29 · 100 is 28.999999999999996 in float64: a bare floor keeps 28."""
    assert math.floor(0.29 * 100) == 28
    totals = torch.arange(0, 3000)
    for percent in range(1, 101):
        expected = [min(n, max(1, percent * n // 100)) for n in totals.tolist()]
        assert [keep_count(percent / 100, n) for n in totals.tolist()] == expected
        assert keep_counts(percent / 100, totals.to(torch.int32)).tolist() == expected


def test_counts_do_not_round_up():
    """The headroom is for the rounding of the product alone: a ratio that is truly below stays below."""
    assert keep_count(0.2999999999, 10) == 2
    assert keep_count(1 / 3, 3) == 1
    assert keep_count(0.5 - 2**-40, 2**20) == 2**19 - 1


@st.composite
def kept_samples(draw):
    lengths = draw(st.lists(st.integers(0, 12), min_size=1, max_size=8))
    role = draw(st.lists(st.sampled_from((0, 2, 4)), min_size=len(lengths), max_size=len(lengths)))
    values = st.integers(0, 3).map(float) | st.floats(0, 200, width=32)
    nll = draw(st.lists(values, min_size=sum(lengths), max_size=sum(lengths)))
    return torch.tensor(nll), lengths, role


OPTIONS = st.fixed_dictionaries(
    {
        "neighbor_weight": st.sampled_from((0.0, 0.5, 1.0)) | st.floats(0, 1),
        "order": st.sampled_from(("keep_low", "keep_high")),
        "neighbor_reduction": st.sampled_from(("sum", "mean")),
    }
)


@PROPERTY
@given(kept_samples(), st.integers(1, 100), OPTIONS)
def test_tokens_kept_of_every_sample(sample, percent, options):
    """max(1, ⌊r n⌋) in Q2 and all in Q4, and none scored worse than one that was pruned."""
    nll, lengths, role = sample
    mask = qk.prune_tokens(nll, prefix_sum(lengths), triage_of(role), percent / 100, **options)
    weight, sign = options["neighbor_weight"], 1 if options["order"] == "keep_low" else -1
    for tokens, keep, r in zip(nll.split(lengths), mask.split(lengths), role, strict=True):
        n = len(tokens)
        assert keep.sum() == {0: 0, 2: min(n, max(1, percent * n // 100)), 4: n}[r]
        if r != 2 or n == 0:
            continue
        p = tokens.clamp(max=88).exp().double()
        around = torch.cat((p[:1], p[:-1])) + torch.cat((p[1:], p[-1:]))
        around = around / 2 if options["neighbor_reduction"] == "mean" else around
        score = sign * ((1 - weight) * p + weight * around)
        if keep.all():
            continue
        worst, best = score[keep].max(), score[~keep].min()
        assert worst <= best + 1e-6 * best.abs()


@PROPERTY
@given(kept_samples(), st.integers(1, 100), OPTIONS)
def test_ties_keep_the_earlier_token(sample, percent, options):
    """On a constant sample every score ties, so what stays is a prefix."""
    nll, lengths, role = sample
    mask = qk.prune_tokens(nll * 0 + 1, prefix_sum(lengths), triage_of(role), percent / 100, **options)
    for keep in mask.split(lengths):
        assert torch.equal(keep, torch.arange(len(keep)) < keep.sum())


GOOD = (torch.ones(3), prefix_sum([1, 2]), triage_of([2, 4]), 0.5)


@pytest.mark.parametrize(
    ("place", "value", "error", "message"),
    [
        (0, [1.0], TypeError, "nll is a list; accepted: a tensor"),
        (0, torch.ones(1, 3), ValueError, r"nll has shape \[1, 3\]; accepted: one dimension"),
        (
            0,
            torch.ones(3, dtype=torch.bfloat16),
            ValueError,
            "nll has dtype torch.bfloat16; accepted: torch.f",
        ),
        (0, torch.ones(4), ValueError, "cu_seqlens runs from 0 to 3; accepted: from 0 to .* tokens, 4"),
        (1, prefix_sum([1, 2]).long(), ValueError, "cu_seqlens has dtype torch.int64; accepted: torch.int32"),
        (1, prefix_sum([1, 2])[:0], ValueError, r"cu_seqlens is empty; accepted: B\+1 entries"),
        (1, torch.tensor([1, 2, 3]).int(), ValueError, "cu_seqlens runs from 1 to 3"),
        (
            1,
            torch.tensor([0, 4, 3]).int(),
            ValueError,
            "cu_seqlens falls from 4 to 3 at entry 2; accepted: non-",
        ),
        (1, prefix_sum([1, 1, 1]), ValueError, "triage.role has 2 entries; accepted: 3, one per segment"),
        (2, triage_of([2])._replace(role=torch.ones(2)), ValueError, "triage.role has dtype torch.float32"),
        (3, 0.0, ValueError, r"keep_ratio is 0.0; accepted: a number in \(0, 1\]"),
        (3, True, TypeError, "keep_ratio is True; accepted: a number"),
    ],
)
def test_bad_arguments(place, value, error, message):
    arguments = list(GOOD)
    arguments[place] = value
    with pytest.raises(error, match=message):
        qk.prune_tokens(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neighbor_weight": -0.1}, r"neighbor_weight is -0.1; accepted: a number in \[0, 1\]"),
        ({"neighbor_weight": NAN}, "neighbor_weight is nan; accepted"),
        ({"order": "low"}, "order is 'low'; accepted: 'keep_low', 'keep_high'"),
        ({"neighbor_reduction": "max"}, "neighbor_reduction is 'max'; accepted: 'sum', 'mean'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        qk.prune_tokens(*GOOD, **options)
