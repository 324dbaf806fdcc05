"""The compared selections: what they keep, how many, and that they never keep a sample without tokens."""

import math

import pytest
import torch

import qtuning_kernels as qk
from qtuning_kernels.pruning import baselines

LENGTHS = torch.tensor([3, 0, 9, 1, 9, 4])
CU_SEQLENS = torch.tensor([0, 3, 3, 12, 13, 22, 26], dtype=torch.int32)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def test_longest():
    assert baselines.longest_samples(LENGTHS, 0.34).kept_index.tolist() == [2, 4]
    assert baselines.longest_samples(LENGTHS, 0.17).kept_index.tolist() == [2]
    triage = baselines.longest_samples(LENGTHS, 1.0)
    assert triage.kept_index.tolist() == [0, 2, 3, 4, 5, 6]
    assert triage.role.tolist() == [2, 0, 2, 2, 2, 2]


def test_entropy():
    entropy = torch.tensor([0.3, math.nan, 0.9, 0.1, math.inf, 0.9])
    assert baselines.entropy_samples(entropy, 0.34).kept_index.tolist() == [2, 5]


def test_random_samples_are_uniform():
    """400 draws of 2 of 5: each sample 160 times, standard deviation 9.8; the empty one never."""
    counts = sum(baselines.random_samples(LENGTHS, 0.34, generator(seed)).keep.int() for seed in range(400))
    assert counts.sum() == 800
    assert counts[1] == 0
    assert ((counts - 160).abs() < 50)[LENGTHS > 0].all()


def test_random_tokens():
    triage = baselines.longest_samples(LENGTHS, 1.0)
    masks = [baselines.random_tokens(CU_SEQLENS, 26, triage, 0.5, generator(seed)) for seed in range(2)]
    for mask in masks:
        assert [int(part.sum()) for part in mask.split(LENGTHS.tolist())] == [1, 0, 4, 1, 4, 2]
    assert not torch.equal(*masks)
    assert torch.equal(masks[0], baselines.random_tokens(CU_SEQLENS, 26, triage, 0.5, generator(0)))


def test_ppl_tokens():
    """The two baselines that `prune_tokens` is already."""
    nll = torch.tensor([3.0, 1.0, 2.0, 0.5])
    triage = baselines.longest_samples(torch.tensor([4]), 1.0)
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32)
    low = qk.prune_tokens(nll, cu_seqlens, triage, 0.5, neighbor_weight=0.0)
    high = qk.prune_tokens(nll, cu_seqlens, triage, 0.5, neighbor_weight=0.0, order="keep_high")
    assert low.tolist() == [False, True, False, True]
    assert high.tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: baselines.longest_samples(LENGTHS.float(), 0.5), "num_tokens has dtype torch.float32"),
        (lambda: baselines.entropy_samples(LENGTHS, 0.5), "entropy has dtype torch.int64"),
        (lambda: baselines.random_samples(LENGTHS, 0.0), r"keep_ratio is 0.0; accepted"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
