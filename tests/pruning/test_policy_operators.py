"""`segment_means`, `triage_rank` and `select_tokens`: every backend gives what the reference gives, exactly.

The pools are as rough as the contract allows: ties, duplicates, constant axes, NaN, infinities, segments of 0
and 1. Sizes lie around the powers of two at which a kernel changes its plan, and above its block.
"""

import math

import pytest
import torch

from qtuning_kernels.pruning import operators as reference_policy


class _Served:
    """The operators of whatever serves the test's tensors."""

    def __getattr__(self, name):
        return lambda x, *rest: getattr(reference_policy.operators_for(x.device), name)(x, *rest)


_ops = _Served()

POOLS = (1, 2, 3, 31, 32, 33, 100, 257)
# values from this many levels: all equal, mostly tied, some tied, none tied
LEVELS = (1, 4, 100, None)


def axis(size, levels, broken=False):
    x = torch.rand(size) * 20 if levels is None else torch.randint(0, levels, (size,)).float()
    if broken:
        x[torch.rand(size) < 0.2] = torch.tensor([math.nan, math.inf, -math.inf])[size % 3]
    return x


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    names = ("quadrant", "role", "keep", "kept_index", "supplemented", "alpha")
    for name, a, e in zip(names, actual, expected, strict=True):
        assert a.dtype == e.dtype, name
        assert torch.equal(a, e), f"{name}: {a.tolist()}, reference {e.tolist()}"


@pytest.mark.parametrize("broken", [False, True], ids=["finite", "broken"])
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("size", POOLS)
def test_triage_rank(backend, size, levels, broken):
    for k in {1, max(1, size // 8), max(1, size // 2), size}:
        ppl, entropy = axis(size, levels, broken), axis(size, levels, broken)
        assert_same(_ops.triage_rank(ppl, entropy, k), reference_policy.triage_rank(ppl, entropy, k))


@pytest.mark.parametrize("correlation", [0.0, 0.9, 1.0, -1.0])
def test_triage_rank_of_correlated_axes(backend, correlation):
    """Correlated axes leave Q2 and Q4 short, so that most samples are filled in; anticorrelated ones tie in
    their keys, so that most are trimmed."""
    for size in POOLS:
        x, y = torch.randn(2, size)
        ppl, entropy = x.exp(), (correlation * x + (1 - correlation**2) ** 0.5 * y).exp()
        k = max(1, size // 4)
        assert_same(_ops.triage_rank(ppl, entropy, k), reference_policy.triage_rank(ppl, entropy, k))


def test_triage_rank_of_nothing_eligible(backend):
    bad = torch.full((5,), math.nan)
    assert_same(_ops.triage_rank(bad, torch.rand(5), 2), reference_policy.triage_rank(bad, torch.rand(5), 2))


def test_triage_rank_of_wide_ranges(backend):
    """Scores are divided, not multiplied by a reciprocal: with subnormal and huge spans the two differ."""
    for scale in (1e-38, 1e-20, 1e20, 1e38):
        ppl, entropy = torch.rand(64) * scale, torch.rand(64)
        assert_same(_ops.triage_rank(ppl, entropy, 48), reference_policy.triage_rank(ppl, entropy, 48))


# empty at both ends and in between; single tokens; one longer than any block of threads
SEGMENTS = ([3], [0], [0, 1, 0], [1] * 40, [0, 5, 0, 0, 17, 1, 64, 2, 0], [700, 1, 0, 2300, 33], [0, 0])


def prefix_sum(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("neighbor_mean", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize("keep_high", [False, True], ids=["low", "high"])
@pytest.mark.parametrize("lengths", SEGMENTS, ids=str)
def test_select_tokens(backend, lengths, keep_high, neighbor_mean):
    """Weights that are no dyadic fraction need their own rounding, and show a fused multiply-add."""
    cu_seqlens = prefix_sum(lengths)
    length = torch.tensor(lengths)
    for weight in (0.0, 0.5, 0.3, 0.7, 1.0):
        for levels in LEVELS:
            ppl = axis(sum(lengths), levels)
            # from none to all, and more than there are
            num_keep = (length * torch.randint(0, 5, length.shape) // 3).to(torch.int64)
            arguments = (ppl, cu_seqlens, num_keep, weight, keep_high, neighbor_mean)
            actual, expected = _ops.select_tokens(*arguments), reference_policy.select_tokens(*arguments)
            assert actual.dtype == torch.bool
            assert torch.equal(actual, expected)
            counts = torch.stack([part.sum() for part in actual.split(lengths)])
            assert torch.equal(counts, torch.minimum(num_keep, length))


def test_select_tokens_of_nearly_tied_scores(backend):
    """Neighbouring float32 numbers: a fused multiply-add or a sum in another order ranks them differently."""
    ppl = 1 + torch.randint(0, 8, (4000,)) * torch.finfo(torch.float32).eps
    for weight in (0.1, 0.3, 0.45):
        arguments = (ppl, prefix_sum([1500, 2500]), torch.tensor([500, 900]), weight, False, False)
        assert torch.equal(_ops.select_tokens(*arguments), reference_policy.select_tokens(*arguments))


@pytest.mark.parametrize("keep_high", [False, True], ids=["low", "high"])
def test_select_tokens_of_non_finite_scores(backend, keep_high):
    """A NaN score counts as +inf; equal ones, the earlier first."""
    ppl = torch.rand(60)
    ppl[::7] = math.nan
    ppl[3::11] = math.inf
    arguments = (ppl, prefix_sum([20, 0, 40]), torch.tensor([12, 0, 25]), 0.5, keep_high, False)
    assert torch.equal(_ops.select_tokens(*arguments), reference_policy.select_tokens(*arguments))


def test_nan_scores_tie_with_infinite_ones(backend):
    """Scores ∞ ∞ NaN NaN NaN NaN NaN 1.5 1.5: a sort that puts NaN above ∞ would keep token 2 first."""
    ppl = torch.tensor([5.0, math.inf, math.inf, math.nan, math.nan, math.nan, 1.0, 1.0, 1.0])
    arguments = (ppl, prefix_sum([9]), torch.tensor([3]), 0.5)
    assert _ops.select_tokens(*arguments, True, False).nonzero().flatten().tolist() == [0, 1, 2]
    assert _ops.select_tokens(*arguments, False, False).nonzero().flatten().tolist() == [0, 7, 8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lengths", SEGMENTS, ids=str)
def test_segment_means(backend, lengths, dtype):
    """Multiples of 2^-10 below 64 add up exactly in float64, in any order: so the means are exact too."""
    values = torch.randint(0, 2**16, (3, sum(lengths))).to(dtype) / 2**10
    actual = _ops.segment_means(values, prefix_sum(lengths))
    assert actual.dtype == torch.float32
    assert actual.shape == (3, len(lengths))
    expected = reference_policy.segment_means(values, prefix_sum(lengths))
    assert torch.equal(actual.nan_to_num(-1.0), expected.nan_to_num(-1.0))
    truth = [[math.fsum(s) / len(s) if len(s) else math.nan for s in row.split(lengths)] for row in values]
    truth = torch.tensor(truth, dtype=torch.float64).float()
    assert torch.equal(actual.nan_to_num(-1.0), truth.nan_to_num(-1.0))


def test_segment_means_accumulate_in_float64(backend):
    """65,536 tokens at an offset of 10^4: a float32 running sum gives a mean that is off by 3.1. Here the
    error is the one rounding to float32, half a unit in the last place at 2^13."""
    values = torch.rand(1, 2**16) + 1e4
    actual = _ops.segment_means(values, prefix_sum([2**16])).double().item()
    expected = math.fsum(values[0].tolist()) / 2**16
    assert abs(actual - expected) <= 2**-24 * 2**13 * 1.001


def test_segment_means_stay_within_their_segment(backend):
    """A prefix sum over all tokens would carry the NaN into later segments, and lose the 1 beside 10^30."""
    values = torch.tensor([[math.nan, 1e30, 1.0, -math.inf, 2.0]])
    actual = _ops.segment_means(values, prefix_sum([1, 1, 1, 1, 1]))
    assert torch.equal(actual.nan_to_num(-1.0), values.nan_to_num(-1.0))


def test_segment_means_read_float64(backend):
    """Rounding the values to float32 first would cancel to 0 here."""
    values = torch.tensor([[1e10 + 1, -1e10]], dtype=torch.float64)
    assert _ops.segment_means(values, prefix_sum([2])).item() == 0.5
