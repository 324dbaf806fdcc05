"""Where the functions meet autograd, the compiler and fake tensors: nothing silently wrong, nothing handed out
twice."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy, linear

import qtuning_kernels as qk

from . import truth

LABELS = torch.tensor([3, 0, 7, 5])


def logits_and_labels(v=11):
    return torch.randn(4, v), LABELS % v


def operands(rows=4, size=6, vocabulary=11):
    return torch.randn(rows, size), torch.randn(vocabulary, size), torch.randint(vocabulary, (rows,))


def stats_sum(hidden, weight, labels):
    return qk.linear_token_stats(hidden, weight, labels).nll.sum()


LINEAR = {"linear_token_stats": stats_sum, "linear_cross_entropy": qk.linear_cross_entropy}


@pytest.mark.parametrize("function", [torch.tanh, torch.exp, torch.sigmoid])
def test_in_place_backward_tells_who_saved_the_logits(backend, function):
    """Operators that save their output read it in their own backward: overwritten by the gradient, without the version
    counter moved, tanh's 1 − y² became 1 − grad² and the gradient of x was wrong without a word."""
    x = torch.randn(4, 11, requires_grad=True)
    logits = function(x)
    loss = qk.token_stats(logits, LABELS, inplace_backward=True).nll.sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_backward_and_a_second_loss(backend):
    """A second loss on the same logits read the first one's gradient in their place."""
    logits, labels = logits_and_labels()
    leaf = logits.clone().requires_grad_()
    x = leaf * 1.0
    first = qk.token_stats(x, labels, inplace_backward=True).nll.sum()
    second = (x * x).sum()
    first.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()


def test_in_place_backward_twice(backend):
    """The second backward took the first one's gradient for the logits."""
    leaf = logits_and_labels()[0].requires_grad_()
    loss = qk.token_stats(leaf * 1.0, LABELS, inplace_backward=True).nll.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_backward_where_nobody_saved_the_logits(backend):
    hidden, weight, labels = operands()
    weight.requires_grad_()
    qk.token_stats(linear(hidden, weight), labels, inplace_backward=True).nll.sum().backward()
    expected = weight.detach().clone().requires_grad_()
    cross_entropy(linear(hidden, expected), labels, reduction="sum").backward()
    torch.testing.assert_close(weight.grad, expected.grad)


@pytest.mark.parametrize("upstream_requires_grad", [False, True])
@pytest.mark.parametrize("name", ["token_stats", *LINEAR])
def test_second_derivative_is_refused(backend, name, upstream_requires_grad):
    """With an upstream gradient that is a constant, a penalty on the gradient's norm had the derivative 0, silently."""
    hidden, weight, labels = operands()
    x = hidden.requires_grad_()
    if name == "token_stats":
        value = qk.token_stats(linear(x, weight), labels).nll.sum()
    else:
        value = LINEAR[name](x, weight, labels)
    upstream = torch.ones((), requires_grad=upstream_requires_grad)
    (grad,) = torch.autograd.grad(value, x, upstream, create_graph=True)
    plain = hidden.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(cross_entropy(linear(plain, weight), labels, reduction="sum"), plain)
    torch.testing.assert_close(grad, expected)  # the first derivative is right
    with pytest.raises(RuntimeError, match=f"{name} has no second derivative"):
        grad.square().sum().backward()


@pytest.mark.parametrize("upstream", [1.0, 0.25])
@pytest.mark.parametrize("name", LINEAR)
def test_gradients_are_their_receivers_own(backend, name, upstream):
    """Saved buffers handed out as gradients: changing .grad in place (clipping) changed what the next backward
    gave, and two backwards added up to 4 instead of 2."""
    hidden, weight, labels = operands()
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    value = LINEAR[name](*leaves, labels) * upstream
    value.backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in leaves]
    assert once[0].abs().max() > 1e-2
    for leaf in leaves:
        leaf.grad.zero_()
    value.backward(retain_graph=True)
    value.backward()
    for leaf, first in zip(leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * first)


@pytest.mark.parametrize("name", LINEAR)
def test_a_second_backward_under_other_weights_is_refused(backend, name):
    hidden, weight, labels = operands()
    weight.requires_grad_()
    value = LINEAR[name](hidden, weight, labels)
    value.backward(retain_graph=True)
    with torch.no_grad():
        weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_outputs_may_be_changed_in_place(backend):
    """Views made inside a custom function refuse it: "Output 0 of _TokenStatsBackward is a view"."""
    hidden, weight, labels = operands()
    for make in (
        lambda x: qk.token_stats(linear(x, weight), labels),
        lambda x: qk.linear_token_stats(x, weight, labels),
    ):
        changed, kept = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
        stats = make(changed)
        stats.nll.mul_(2)
        stats.entropy.add_(1)
        stats.lse.mul_(3)
        (stats.nll + stats.entropy + stats.lse).sum().backward()
        stats = make(kept)
        (2 * stats.nll + stats.entropy + 3 * stats.lse).sum().backward()
        torch.testing.assert_close(changed.grad, kept.grad)


@pytest.mark.parametrize("name", ["token_stats", "token_stats in place", *LINEAR])
def test_compiles_once_for_changing_shapes_and_scales(name):
    """`math.isfinite` of a traced number broke the graph: fullgraph=True failed in the check of the scale; and so did
    the search for overlapping rows, which sorted strides that are symbols. The compiler sees the dispatcher's operators
    alone, whatever backend serves them: one is enough."""

    def value(hidden, weight, labels, scale, softcap):
        options = {"logit_scale": scale, "softcap": softcap}
        if name.startswith("token_stats"):
            in_place = name.endswith("in place")
            return qk.token_stats(linear(hidden, weight), labels, inplace_backward=in_place, **options).nll.sum()
        if name == "linear_token_stats":
            return qk.linear_token_stats(hidden, weight, labels, **options).nll.sum()
        return qk.linear_cross_entropy(hidden, weight, labels, **options)

    torch._dynamo.reset()  # the limit of recompilations counts those of the other parameters
    compiled = torch.compile(value, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, scale, softcap in ((4, 1.5, 7.0), (9, 0.5, 3.0), (6, 2.5, 11.0)):
        hidden, weight, labels = operands(rows)
        eager, traced = (hidden.clone().requires_grad_() for _ in range(2))
        expected = value(eager, weight, labels, scale, softcap)
        actual = compiled(traced, weight, labels, scale, softcap)
        torch.testing.assert_close(actual, expected)
        expected.backward()
        actual.backward()
        torch.testing.assert_close(traced.grad, eager.grad)


def shapes_and_dtypes(name, dtype):
    hidden = torch.empty(2, 3, 6, dtype=dtype, requires_grad=True)
    weight = torch.empty(11, 6, dtype=dtype, requires_grad=True)
    labels = torch.zeros(2, 3, dtype=torch.long)
    if name == "token_stats":
        value = qk.token_stats(linear(hidden, weight), labels).entropy.sum()
    elif name == "linear_token_stats":
        value = qk.linear_token_stats(hidden, weight, labels).entropy.sum()
    else:
        value = qk.linear_cross_entropy(hidden, weight, labels)
    value.backward()
    return [(x.shape, x.dtype) for x in (value, hidden.grad, weight.grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["token_stats", *LINEAR])
def test_without_values(name, dtype):
    """Meta and fake tensors have shapes and no values; the check of the labels asked for one."""
    expected = shapes_and_dtypes(name, dtype)
    with torch.device("meta"):
        assert shapes_and_dtypes(name, dtype) == expected
    with FakeTensorMode():
        assert shapes_and_dtypes(name, dtype) == expected


@pytest.mark.parametrize("token_weight", [None, torch.full((5,), 0.5)])
def test_no_hidden_size(backend, token_weight):
    """H = 0: every logit is the bias, and without one the loss of a token is log V."""
    hidden = torch.randn(5, 0, requires_grad=True)
    weight = torch.randn(8, 0, requires_grad=True)
    bias = torch.zeros(8, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 3, 3])
    factor = 1.0 if token_weight is None else 0.5
    loss = qk.linear_cross_entropy(hidden, weight, labels, bias=bias, token_weight=token_weight)
    loss.backward()
    assert loss.item() == pytest.approx(5 * factor * math.log(8))
    assert (hidden.grad.shape, weight.grad.shape) == (hidden.shape, weight.shape)
    expected = factor * (torch.full((8,), 5 / 8) - torch.bincount(labels, minlength=8))
    torch.testing.assert_close(bias.grad, expected)
    stats = qk.linear_token_stats(hidden, weight, labels)
    torch.testing.assert_close(stats.entropy, torch.full((5,), math.log(8)))


@pytest.mark.parametrize(
    ("size", "stride"), [((4, 11), (0, 1)), ((4, 11), (5, 1)), ((2, 3, 11), (11, 11, 1)), ((2, 3, 11), (20, 10, 1))]
)
def test_rows_that_overlap_are_refused_in_place(size, stride):
    """Written over each other, rows would hold a mixture of gradients."""
    logits = torch.randn(200).as_strided(size, stride)
    labels = torch.zeros(size[:-1], dtype=torch.long)
    with pytest.raises(ValueError, match="so that rows share memory; accepted with inplace_backward=True"):
        qk.token_stats(logits, labels, inplace_backward=True)
    qk.token_stats(logits, labels)


@pytest.mark.parametrize(("size", "stride"), [((4, 11), (13, 1)), ((2, 3, 11), (11, 22, 1)), ((2, 1, 11), (40, 0, 1))])
def test_rows_apart_are_accepted_in_place(backend, size, stride):
    memory = torch.randn(200)
    logits = memory.as_strided(size, stride)
    expected = logits.clone().requires_grad_()
    labels = torch.ones(size[:-1], dtype=torch.long)
    cross_entropy(expected.flatten(0, -2), labels.flatten(), reduction="sum").backward()
    x = memory.clone().as_strided(size, stride).requires_grad_()
    qk.token_stats(x, labels, inplace_backward=True).nll.sum().backward()
    torch.testing.assert_close(x.grad, expected.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("vocabulary", [1, 9, 5000])
def test_lse_of_infinite_rows_is_pytorch_s(backend, dtype, vocabulary):
    """A row of −inf has lse −inf, one with +inf has +inf, one with a NaN has NaN; they were NaN all three. Their
    neighbours are not touched."""
    logits = torch.randn(5, vocabulary).to(dtype)
    logits[1] = -torch.inf
    logits[2, vocabulary // 2] = torch.inf
    logits[3, vocabulary // 2] = torch.nan
    labels = torch.zeros(5, dtype=torch.long)
    stats = qk.token_stats(logits, labels)
    expected = torch.logsumexp(logits.double(), -1)
    torch.testing.assert_close(stats.lse.double(), expected, equal_nan=True, rtol=1e-5, atol=1e-6)
    assert torch.isnan(stats.nll[1:4]).all()
    assert torch.isnan(stats.entropy[1:4]).all()
    assert torch.isfinite(stats.nll[[0, 4]]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tiny_weights_in_half_precision(backend, dtype):
    """Weights of 1/4096 make gradients near float16's smallest numbers; ours lose no more than PyTorch's do."""
    hidden, weight, labels = (x.to(dtype) if x.is_floating_point() else x for x in operands(32, 16, 64))
    token_weight = torch.full((32,), 1 / 4096)

    exact = truth.loss_grads(truth.weighted_loss, hidden.double(), weight.double(), labels, token_weight)
    ours = truth.loss_grads(qk.linear_cross_entropy, hidden, weight, labels, token_weight)
    theirs = truth.loss_grads(truth.weighted_loss, hidden, weight, labels, token_weight)
    for a, b, true in zip(ours, theirs, exact, strict=True):
        errors = [((x.double() - true).abs().max() / true.abs().max()).item() for x in (a, b)]
        assert errors[0] <= errors[1] + torch.finfo(dtype).eps
