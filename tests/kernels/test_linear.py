"""`linear_token_stats` and `linear_cross_entropy` on every backend, against float64."""

import pytest
import torch
from torch.nn.functional import linear

import qtuning_kernels as qk

from . import truth
from .test_token_stats import HALF, truncates, upstreams

DTYPES = (torch.float32, torch.float64, *HALF)
# rows over and under a tile; hidden sizes that no tile divides; one column, odd, and GPT-2's vocabulary
SHAPES = ((5, 16, 1), (33, 24, 1000), (70, 64, 4097), (3, 40, 50257))


def make(dtype, rows, size, vocabulary, bias=False):
    hidden = torch.randn(rows, size, dtype=torch.float64).to(dtype)
    weight = (torch.randn(vocabulary, size, dtype=torch.float64) * 2 / size**0.5).to(dtype)
    labels = torch.randint(0, vocabulary, (rows,))
    labels[1] = -100
    return hidden, weight, torch.randn(vocabulary, dtype=torch.float64).to(dtype) if bias else None, labels


def assert_no_worse(name, actual, same, expected, epsilon=1e-6):
    """Largest error against float64, relative where the truth is over 1: at most PyTorch's at the same dtype + 1e-6."""
    assert torch.isfinite(actual).all(), f"{name} is not finite"
    scale = expected.double().abs().clamp(min=1.0)
    ours, theirs = (((x.double() - expected.double()).abs() / scale).max().item() for x in (actual, same))
    assert ours <= theirs + epsilon, f"{name}: error {ours:.3g}, PyTorch's {theirs:.3g} + {epsilon:.0e}"


def torch_stats(labels, **scaling):
    return lambda hidden, weight, bias=None: truth.stats(linear(hidden, weight, bias), labels, **scaling)


def assert_half(backend, dtype, name, actual, same, expected):
    """Half precision rounds the logits, their gradient and the result, and so does PyTorch: which of the two
    has the larger maximum is a matter of luck. Epsilon is therefore half a unit in the last place of the
    tensor's scale (a whole one where the interpreter truncates): what one more rounding can do."""
    epsilon = torch.finfo(dtype).eps * (1.0 if truncates(backend) else 0.5)
    scale = expected.abs().max().clamp(min=1e-12)
    ours = ((actual.double() - expected).abs().max() / scale).item()
    theirs = ((same.double() - expected).abs().max() / scale).item()
    assert ours <= theirs + epsilon, f"{name}: error {ours:.3g}, PyTorch's {theirs:.3g} + {epsilon:.3g}"


def assert_stats(backend, actual, hidden, weight, bias, labels, **scaling):
    doubles = [x if x is None else x.double() for x in (hidden, weight, bias)]
    expected = torch_stats(labels, **scaling)(*doubles)
    # PyTorch at the same dtype: logits of the operands' dtype, then float32 statistics of them
    logits = linear(hidden, weight, bias)
    same = truth.stats(logits if logits.dtype == torch.float64 else logits.float(), labels, **scaling)
    for name, a, s, e in zip(qk.TokenStats._fields, actual, same, expected, strict=True):
        assert a.shape == labels.shape
        if hidden.dtype in HALF:
            assert_half(backend, hidden.dtype, name, a, s, e)
        else:
            assert_no_worse(name, a, s, e)


def assert_grads(backend, actual, operands, expected, same):
    for name, a, x, s, e in zip(("hidden", "weight", "bias"), actual, operands, same, expected, strict=False):
        assert a.dtype == x.dtype
        assert a.shape == x.shape
        if x.dtype in HALF:
            assert_half(backend, x.dtype, name, a, s, e)
        else:
            assert_no_worse(name, a, s, e)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_stats(backend, dtype, shape, bias):
    hidden, weight, bias, labels = make(dtype, *shape, bias=bias)
    stats = qk.linear_token_stats(hidden, weight, labels, bias=bias)
    assert_stats(backend, stats, hidden, weight, bias, labels)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaling", [{}, {"logit_scale": 0.3, "softcap": 4.0}], ids=str)
def test_stats_backward(backend, dtype, scaling):
    *operands, labels = make(dtype, 33, 24, 1000, bias=True)
    upstream = upstreams(labels.shape)

    def ours(hidden, weight, bias):
        return qk.linear_token_stats(hidden, weight, labels, bias=bias, **scaling)

    actual = truth.grads(ours, operands, upstream)
    expected = truth.grads(torch_stats(labels, **scaling), [x.double() for x in operands], upstream)
    same = truth.grads(torch_stats(labels, **scaling), operands, upstream)
    assert_grads(backend, actual, operands, expected, same)


def torch_loss(labels, token_weight, **scaling):
    def loss(hidden, weight, bias=None):
        nll = torch_stats(labels, **scaling)(hidden, weight, bias)[0]
        return (nll * token_weight.to(nll.dtype)).sum(), torch.zeros(())

    return loss


LOSS_UPSTREAM = [torch.tensor(0.7, dtype=torch.float64), torch.zeros(())]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scaling", [{}, {"logit_scale": 0.3, "softcap": 4.0}], ids=str)
def test_cross_entropy(backend, dtype, shape, scaling):
    """Non-uniform weights, one of them 0 and one negative, and an upstream gradient that is not 1."""
    *operands, labels = make(dtype, *shape, bias=True)
    token_weight = torch.rand(labels.shape[0])
    token_weight[0], token_weight[2] = 0.0, -0.5

    def ours(hidden, weight, bias):
        loss = qk.linear_cross_entropy(hidden, weight, labels, bias=bias, token_weight=token_weight, **scaling)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        return loss, torch.zeros(())

    reference = torch_loss(labels, token_weight, **scaling)
    doubles = [x.double() for x in operands]
    actual, expected = ours(*operands)[0], reference(*doubles)[0]
    same = reference(*operands)[0]
    (
        assert_half(backend, dtype, "loss", actual, same, expected)
        if dtype in HALF
        else assert_no_worse("loss", actual, same, expected)
    )
    assert_grads(
        backend,
        truth.grads(ours, operands, LOSS_UPSTREAM),
        operands,
        truth.grads(reference, doubles, LOSS_UPSTREAM),
        truth.grads(reference, operands, LOSS_UPSTREAM),
    )


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 0, 0)])
def test_only_the_gradients_that_are_needed(backend, needs):
    """A frozen head (LoRA), a frozen body, a trained bias alone; and none at all."""
    *operands, labels = make(torch.float64, 9, 8, 30, bias=True)
    full = [x.clone().requires_grad_() for x in operands]
    some = [x.clone().requires_grad_(bool(need)) for x, need in zip(operands, needs, strict=True)]
    for function in (qk.linear_cross_entropy, lambda *a, **k: qk.linear_token_stats(*a, **k).nll.sum()):
        for leaves in (full, some):
            for leaf in leaves:
                leaf.grad = None
            loss = function(leaves[0], leaves[1], labels, bias=leaves[2])
            assert loss.requires_grad == any(leaf.requires_grad for leaf in leaves)
            if loss.requires_grad:
                loss.backward()
        for need, a, e in zip(needs, some, full, strict=True):
            if need:
                torch.testing.assert_close(a.grad, e.grad, rtol=1e-12, atol=1e-14)
            else:
                assert a.grad is None


def test_zero_weight_rows_hold_anything(backend):
    """Pruned and ignored rows take no part, even where their hidden states are NaN or infinite."""
    hidden, weight, _, labels = make(torch.float32, 6, 8, 40)
    labels[:] = torch.arange(6)
    labels[4] = -100
    poisoned = hidden.clone()
    poisoned[2], poisoned[4] = torch.nan, torch.inf
    token_weight = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, -0.0])
    results = []
    for h in (hidden, poisoned):
        h, w = h.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = qk.linear_cross_entropy(h, w, labels, token_weight=token_weight)
        loss.backward()
        results.append((loss.detach(), h.grad, w.grad))
    assert all(torch.isfinite(x).all() for x in results[1])
    for clean, other in zip(*results, strict=True):
        torch.testing.assert_close(clean, other)
    assert (results[1][1][[2, 4, 5]] == 0).all()

    h, w = poisoned.clone().requires_grad_(), weight.clone().requires_grad_()
    qk.linear_token_stats(h, w, labels).nll.backward(token_weight)
    assert (h.grad[[2, 4, 5]] == 0).all()
    torch.testing.assert_close(w.grad, results[0][2])


def test_nothing_to_learn(backend):
    """All rows ignored or none at all: loss 0, zero gradients, and a graph that still holds the parameters
    (without it a data-parallel run waits for a gradient that never comes)."""
    for rows in (0, 4):
        hidden = torch.randn(rows, 8, requires_grad=True)
        weight = torch.randn(30, 8, requires_grad=True)
        labels = torch.full((rows,), -100)
        loss = qk.linear_cross_entropy(hidden, weight, labels)
        loss.backward()
        assert loss.item() == 0
        assert torch.equal(hidden.grad, torch.zeros_like(hidden))
        assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_head_gradient_accumulates_in_float32(backend):
    """Low-precision accumulation of the head's gradient (Liger #512, #827). 4096 equal rows of weight 2⁻¹²
    add up to one row's gradient; summed chunk by chunk in bfloat16, additions below half a unit in the last
    place are lost, and the sum stalls near 2⁻⁴ of it."""
    hidden = torch.ones(4096, 8, dtype=torch.bfloat16)
    weight = torch.zeros(16, 8, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(4096, dtype=torch.long)
    qk.linear_cross_entropy(hidden, weight, labels, token_weight=torch.full((4096,), 2.0**-12)).backward()
    expected = torch.full((16, 8), 1 / 16)
    expected[0] -= 1
    torch.testing.assert_close(weight.grad.float(), expected, rtol=2**-8, atol=0)


def test_many_chunks(backend):
    """More rows than one workspace holds: every chunk lands in its own rows, and sums run over all."""
    rows = 700 if backend == "triton" else 5000
    hidden, weight, _, labels = make(torch.float32, rows, 8, 3001)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    token_weight = torch.rand(rows) / rows
    qk.linear_cross_entropy(*leaves, labels, token_weight=token_weight).backward()
    reference = torch_loss(labels, token_weight)
    unit = [torch.ones((), dtype=torch.float64), torch.zeros(())]
    expected = truth.grads(reference, [hidden.double(), weight.double()], unit)
    same = truth.grads(reference, [hidden, weight], unit)
    assert_grads(backend, [x.grad for x in leaves], [hidden, weight], expected, same)
    stats = qk.linear_token_stats(hidden, weight, labels)
    assert_stats(backend, stats, hidden, weight, None, labels)


def test_gradcheck(backend):
    *operands, labels = make(torch.float64, 5, 4, 7, bias=True)
    operands = [x.requires_grad_() for x in operands]
    token_weight = torch.rand(5, dtype=torch.float64)

    def stats(hidden, weight, bias):
        return qk.linear_token_stats(hidden, weight, labels, bias=bias, softcap=3.0, logit_scale=0.5)

    def loss(hidden, weight, bias):
        return qk.linear_cross_entropy(hidden, weight, labels, bias=bias, token_weight=token_weight, softcap=3.0)

    assert torch.autograd.gradcheck(stats, operands)
    assert torch.autograd.gradcheck(loss, operands)


def test_leading_dimensions_and_non_contiguous_operands(backend):
    hidden = torch.randn(2, 5, 8).transpose(0, 1)
    weight = torch.randn(8, 30).T
    labels = torch.randint(0, 30, (2, 5)).T
    stats = qk.linear_token_stats(hidden, weight, labels)
    assert_stats(backend, stats, hidden, weight, None, labels)
    loss = qk.linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(loss, stats.nll.sum())


def test_autocast_casts_like_linear(backend):
    hidden = torch.randn(6, 8, requires_grad=True)
    weight = torch.randn(30, 8, requires_grad=True)
    labels = torch.randint(0, 30, (6,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = qk.linear_cross_entropy(hidden, weight, labels)
        stats = qk.linear_token_stats(hidden, weight, labels)
    loss.backward()
    assert weight.grad.dtype == torch.float32
    halves = qk.linear_token_stats(hidden.bfloat16(), weight.bfloat16(), labels)
    assert torch.equal(stats.nll, halves.nll)
    torch.testing.assert_close(loss, halves.nll.sum())


def test_compiles_to_one_graph(backend):
    hidden, weight, _, labels = make(torch.float32, 6, 8, 40)

    def loss(hidden, weight):
        stats = qk.linear_token_stats(hidden * 2, weight, labels)
        return qk.linear_cross_entropy(hidden, weight, labels) + stats.entropy.sum()

    eager, compiled = ([x.clone().requires_grad_() for x in (hidden, weight)] for _ in range(2))
    loss(*eager).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*compiled).backward()
    for a, e in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a.grad, e.grad)


def test_operators_obey_their_schemas(backend):
    hidden, weight, bias, labels = make(torch.float32, 6, 8, 40, bias=True)
    scaling = (-100, 1.0, None)
    utilities = ("test_schema", "test_faketensor")
    ops = torch.ops.qtuning_kernels
    operands = (hidden, weight, bias, labels)
    torch.library.opcheck(ops.linear_token_stats, (*operands, *scaling), test_utils=utilities)
    _, *stats = ops.linear_token_stats(*operands, *scaling)
    g = torch.randn(6)
    for needs in ([True, True, True], [True, False, False], [False, False, False]):
        torch.library.opcheck(
            ops.linear_token_stats_backward,
            (*operands, *stats, g, g, None, *scaling, needs),
            test_utils=utilities,
        )
        torch.library.opcheck(ops.linear_cross_entropy, (*operands, g.abs(), *scaling, needs), test_utils=utilities)
