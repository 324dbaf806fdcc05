"""The Error–Uncertainty plane: exp of the mean nll, mean entropy, and samples without a place."""

import math

import pytest
import torch

import qtuning_kernels as qk


def prefix_sum(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_worked(dtype):
    nll = torch.tensor([0.0, 2.0, 3.0, 1.0, 2.0, 6.0], dtype=dtype)
    entropy = torch.tensor([1.0, 2.0, 0.5, 0.0, 0.0, 3.0], dtype=dtype)
    plane = qk.eu_plane(nll, entropy, prefix_sum([2, 1, 0, 3]))
    expected = torch.tensor([1.0, 3.0, math.nan, 3.0]).exp()
    torch.testing.assert_close(plane.ppl, expected, equal_nan=True, rtol=2e-7, atol=0)
    torch.testing.assert_close(plane.entropy, torch.tensor([1.5, 0.5, math.nan, 1.0]), equal_nan=True)
    assert plane.num_tokens.tolist() == [2, 1, 0, 3]
    assert [x.dtype for x in plane] == [torch.float32, torch.float32, torch.int64]


def test_broken_token_spoils_its_own_sample_only():
    """A running sum over the whole pool would carry the NaN into every later sample."""
    nll = torch.tensor([1.0, math.nan, 2.0, math.inf, 3.0])
    plane = qk.eu_plane(nll, torch.ones(5), prefix_sum([1, 1, 1, 1, 1]))
    assert plane.ppl.isfinite().tolist() == [True, False, True, False, True]
    assert plane.entropy.tolist() == [1.0] * 5


def test_perplexity_that_overflows_is_ineligible():
    """Mean nll 90: e^90 is infinite in float32, so the sample has no place on the plane (decision d)."""
    plane = qk.eu_plane(torch.tensor([90.0, 1.0]), torch.ones(2), prefix_sum([1, 1]))
    assert plane.ppl[0] == math.inf
    assert qk.triage_samples(plane.ppl, plane.entropy, 1.0).keep.tolist() == [False, True]


def test_gradient_free():
    nll = torch.rand(4, requires_grad=True)
    assert not qk.eu_plane(nll, torch.rand(4), prefix_sum([2, 2])).ppl.requires_grad


NLL, ENTROPY, CU_SEQLENS = torch.ones(3), torch.ones(3), prefix_sum([1, 2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (NLL.int(), ENTROPY, CU_SEQLENS),
            "nll has dtype torch.int32; accepted: torch.float32, torch.float64",
        ),
        ((NLL, ENTROPY.double(), CU_SEQLENS), "entropy has dtype torch.float64; accepted: torch.float32"),
        ((NLL, ENTROPY[:2], CU_SEQLENS), "entropy has 2 entries; accepted: 3, one per token of nll"),
        ((NLL, ENTROPY.to("meta"), CU_SEQLENS), "entropy is on device meta; accepted: cpu"),
        ((NLL, ENTROPY, CU_SEQLENS.view(3, 1)), r"cu_seqlens has shape \[3, 1\]; accepted: one dimension"),
        ((NLL, ENTROPY, prefix_sum([1, 1])), "cu_seqlens runs from 0 to 2; accepted: from 0 to .* tokens, 3"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        qk.eu_plane(*arguments)
