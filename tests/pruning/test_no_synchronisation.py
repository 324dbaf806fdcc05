"""The policy never reads a value on the host: it runs where there are no values to read."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import qtuning_kernels as qk
from qtuning_kernels.pruning.bisection import triage_bisect
from qtuning_kernels.pruning.rank import triage_rank
from qtuning_kernels.pruning.segments import segment_means
from qtuning_kernels.pruning.tokens import select_tokens

READS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique",
    "_unique2",
    "item",
    "is_nonzero",
    "equal",
}
SAMPLES, TOKENS = 10, 40


class NoReads(TorchDispatchMode):
    """Fails on every operator that copies a value to the host or whose result's shape depends on one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        if name in READS or masked:
            raise AssertionError(f"{func} reads a value")
        return func(*args, **(kwargs or {}))


def operands(device="cpu"):
    nll, entropy = torch.rand(2, TOKENS, device=device)
    cu_seqlens = torch.arange(0, TOKENS + 1, TOKENS // SAMPLES, dtype=torch.int32, device=device)
    return nll, entropy, cu_seqlens


def policy(nll, entropy, cu_seqlens, method="rank"):
    plane = qk.eu_plane(nll, entropy, cu_seqlens)
    triage = qk.triage_samples(plane.ppl, plane.entropy, 0.3, method=method)
    return qk.prune_tokens(nll, cu_seqlens, triage, 0.5), triage


OPERATORS = {
    "segment_means": lambda nll, entropy, cu: segment_means(torch.stack((nll, entropy)), cu),
    "triage_rank": lambda nll, entropy, cu: triage_rank(nll, entropy, 3),
    "triage_bisect": lambda nll, entropy, cu: triage_bisect(nll, entropy, 3),
    "select_tokens": lambda nll, entropy, cu: select_tokens(
        nll, cu, torch.ones_like(cu[1:], dtype=torch.int64), 0.5, False, True
    ),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_read_nothing(operator, device):
    with NoReads():
        OPERATORS[operator](*operands(device))


@pytest.mark.parametrize(
    "reading",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x[x.argmax()],  # an index of no dimensions is read on the host
        lambda x: torch.equal(x, x),
    ],
)
def test_the_check_can_fail(reading):
    with NoReads(), pytest.raises(AssertionError, match="reads a value"):
        reading(torch.rand(5))


@pytest.mark.parametrize("method", ["rank", "bisect"])
def test_shapes_are_known_beforehand(method):
    """On meta tensors the whole policy yields its shapes, so they depend on B, T and the ratios alone."""
    mask, triage = policy(*operands("meta"), method)
    assert mask.shape == (TOKENS,)
    assert triage.kept_index.shape == (3,)
    assert triage.alpha.shape == ()


@pytest.mark.parametrize(("method", "dynamic"), [("rank", False), ("rank", True), ("bisect", False)])
def test_traces_whole(method, dynamic):
    """One graph without a break, the argument checks included."""
    torch._dynamo.reset()
    traced = torch.compile(policy, fullgraph=True, dynamic=dynamic, backend="eager")
    arguments = operands()
    mask, triage = traced(*arguments, method)
    expected_mask, expected_triage = policy(*arguments, method)
    assert torch.equal(mask, expected_mask)
    assert all(torch.equal(a, b) for a, b in zip(triage, expected_triage, strict=True))
