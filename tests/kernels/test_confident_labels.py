"""Where the model is sure of the label, fine-tuning's usual token, p − 1 is small and every rounding before it
shows."""

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

import qtuning_kernels as qk
from qtuning_kernels.kernels import linear_chunks

from . import truth

HALF = (torch.bfloat16, torch.float16)


def confident(dtype, rows=48, size=16, vocabulary=300):
    """Hidden states moved towards the rows of their labels until the median p(label) is over 0.999 as rounded."""
    weight = torch.randn(vocabulary, size, dtype=torch.float64)
    labels = torch.randint(vocabulary, (rows,))
    hidden = 0.3 * torch.randn(rows, size, dtype=torch.float64) + 2.2 * weight[labels]
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    p = linear(hidden, weight).double().softmax(-1).gather(-1, labels[:, None])
    assert p.median() > 0.999
    return hidden, weight, labels


@pytest.mark.parametrize("chunks", ["one chunk", "several chunks"])
@pytest.mark.parametrize("dtype", HALF)
def test_gradients_of_confident_labels(backend, monkeypatch, dtype, chunks):
    """Statistics of unrounded logits beside a gradient of rounded ones made the gradient of hidden wrong by 2 to
    7000 times itself. Row by row no worse than PyTorch at the same dtype, plus one unit in the last place of the
    row's scale; in several chunks the head's gradient takes its pass over columns."""
    if chunks == "several chunks":
        monkeypatch.setitem(linear_chunks._WORKSPACE, "cpu", 8 * 300 * 2)
        monkeypatch.setattr(linear_chunks, "_WORKSPACE_ELSEWHERE", 8 * 300 * 2)
    hidden, weight, labels = confident(dtype)
    token_weight = torch.rand(len(labels)) + 0.5
    doubles = hidden.double(), weight.double(), labels, token_weight.double()
    exact = truth.loss_grads(truth.weighted_loss, *doubles)
    ours = truth.loss_grads(qk.linear_cross_entropy, hidden, weight, labels, token_weight)
    theirs = truth.loss_grads(truth.weighted_loss, hidden, weight, labels, token_weight)
    # p is a float32 number near 1, and float16 ends there: p − 1 is known to 2^-24, of which a row adds a few
    floor = 8 * 2.0**-24 * token_weight.max().item()
    for name, a, b, true, factor in zip(("hidden", "weight"), ours, theirs, exact, (weight, hidden), strict=True):
        errors = [(x.double() - true).abs().amax(1) for x in (a, b)]
        allowed = errors[1] + torch.finfo(dtype).eps * true.abs().amax(1) + floor * factor.double().abs().max()
        worst = (errors[0] - allowed).argmax()
        assert errors[0][worst] <= allowed[worst], f"{name}: {errors[0][worst]:.3g}, PyTorch's {errors[1][worst]:.3g}"
    assert (ours[0].abs().amax(1) > 1e-4).sum() > 10  # rows that the floor does not hide


def test_a_confident_row_by_hand(backend):
    """h = [1, 1/64], w = [[16, 5], [10, 0]], label 0 in bfloat16: the gradient of h[0] is −0.0137; PyTorch's, of
    the logit rounded to 16.125, is −0.0131; the kernel that kept two sets of logits gave +0.754."""
    hidden = torch.tensor([[1.0, 1 / 64]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[16.0, 5.0], [10.0, 0.0]], dtype=torch.bfloat16)
    (grad,) = torch.autograd.grad(qk.linear_cross_entropy(hidden, weight, torch.tensor([0])), hidden)
    assert -0.0140 < grad[0, 0].item() < -0.0128


def test_gradient_of_logits_of_confident_labels(backend):
    """Entry by entry, relative: most entries of such a row are far below any absolute tolerance."""
    logits = torch.randn(32, 501, dtype=torch.float64)
    labels = torch.randint(501, (32,))
    logits[torch.arange(32), labels] += 16
    assert logits.softmax(-1).gather(-1, labels[:, None]).median() > 0.999
    x = logits.float()

    def gradient(z, fused):
        z = z.clone().requires_grad_()
        nll = qk.token_stats(z, labels).nll if fused else cross_entropy(z, labels, reduction="none")
        return torch.autograd.grad(nll.sum(), z)[0].double()

    exact = gradient(x.double(), False)
    off_label = torch.ones_like(exact, dtype=torch.bool).scatter_(1, labels[:, None], False)
    ours, theirs = (((g - exact) / exact).abs() for g in (gradient(x, True), gradient(x, False)))
    assert exact[off_label].abs().median() < 1e-6
    assert ours[off_label].max() <= theirs[off_label].max() + 16 * torch.finfo(torch.float32).eps
    scale = torch.finfo(torch.float32).eps / exact[~off_label].abs()  # p is near 1, and p − 1 keeps its rounding
    assert (ours[~off_label] <= theirs[~off_label] + 4 * scale).all()
