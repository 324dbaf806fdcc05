"""Means of segments, against exact sums."""

import math

import pytest
import torch

from qtuning_kernels.pruning.segments import segment_means

# empty at both ends and in between; single tokens
SEGMENTS = ([3], [0], [0, 1, 0], [1] * 40, [0, 5, 0, 0, 17, 1, 64, 2, 0], [700, 1, 0, 2300, 33], [0, 0])


def prefix_sum(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lengths", SEGMENTS, ids=str)
def test_segment_means(lengths, dtype):
    """Multiples of 2^-10 below 64 add up exactly in float64, in any order: so the means are exact too."""
    values = torch.randint(0, 2**16, (3, sum(lengths))).to(dtype) / 2**10
    actual = segment_means(values, prefix_sum(lengths))
    assert actual.dtype == torch.float32
    assert actual.shape == (3, len(lengths))
    truth = [[math.fsum(s) / len(s) if len(s) else math.nan for s in row.split(lengths)] for row in values]
    truth = torch.tensor(truth, dtype=torch.float64).float()
    assert torch.equal(actual.nan_to_num(-1.0), truth.nan_to_num(-1.0))


def test_segment_means_accumulate_in_float64():
    """65,536 tokens at an offset of 10^4: a float32 running sum gives a mean that is off by 3.1. Here the
    error is the one rounding to float32, half a unit in the last place at 2^13."""
    values = torch.rand(1, 2**16) + 1e4
    actual = segment_means(values, prefix_sum([2**16])).double().item()
    expected = math.fsum(values[0].tolist()) / 2**16
    assert abs(actual - expected) <= 2**-24 * 2**13 * 1.001


def test_segment_means_stay_within_their_segment():
    """A prefix sum over all tokens would carry the NaN into later segments, and lose the 1 beside 10^30."""
    values = torch.tensor([[math.nan, 1e30, 1.0, -math.inf, 2.0]])
    actual = segment_means(values, prefix_sum([1, 1, 1, 1, 1]))
    assert torch.equal(actual.nan_to_num(-1.0), values.nan_to_num(-1.0))


def test_segment_means_read_float64():
    """Rounding the values to float32 first would cancel to 0 here."""
    values = torch.tensor([[1e10 + 1, -1e10]], dtype=torch.float64)
    assert segment_means(values, prefix_sum([2])).item() == 0.5
