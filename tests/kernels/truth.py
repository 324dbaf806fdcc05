"""What the operators must equal, written without them: plain PyTorch, in float64 or in any other dtype.

The criterion everywhere: our error against float64 may not exceed the error that PyTorch itself makes at the
same dtype in the same class of entries, plus a stated epsilon. Half-precision inputs are held to PyTorch's float32
arithmetic on the same values, since statistics are accumulated in float32.

Errors of gradients are per entry and relative to the entry's own terms (`Terms`): almost all entries of a row of
logits' gradient are below 1e-6, and an absolute bound would not see them.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

ULPS = 16  # epsilon of a gradient's entry, of the sum of its terms' magnitudes
ULPS_OF_FLOAT64 = 64  # there the truth has the same dtype, and so an error of the same size as ours
FLOOR = 1e-9  # entries below this part of their row's upstream gradients are held to it
SMALL = 1e-6  # non-label entries below this part of them are a class of their own


def scaled(x: Tensor, logit_scale: float = 1.0, softcap: float | None = None) -> Tensor:
    x = x * logit_scale
    return x if softcap is None else softcap * torch.tanh(x / softcap)


def stats(x: Tensor, labels: Tensor, ignore_index: int = -100, **scaling) -> tuple[Tensor, Tensor, Tensor]:
    """nll, entropy, lse by log_softmax, in the dtype of x."""
    z = scaled(x, **scaling)
    keep = labels != ignore_index
    log_p = torch.log_softmax(z, -1)
    nll = -log_p.gather(-1, labels.long().clamp(min=0).unsqueeze(-1)).squeeze(-1)
    finite = log_p.masked_fill(torch.isneginf(z), 0.0)  # 0·−inf counts as 0
    entropy = -(log_p.exp() * finite).sum(-1)
    return tuple(torch.where(keep, s, 0.0) for s in (nll, entropy, torch.logsumexp(z, -1)))


def p_label(x: Tensor, labels: Tensor, **scaling) -> Tensor:
    """p(label) of every token that has one."""
    nll = stats(x.double(), labels, **scaling)[0]
    return (-nll[labels != -100]).exp()


def objective(outputs, upstream) -> Tensor:
    """Σ upstream·output: backward from it hands each token its own upstream gradients."""
    return sum((o * g.to(o.dtype)).sum() for o, g in zip(outputs, upstream, strict=True))


def grads(function, inputs, upstream) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    objective(function(*leaves), upstream).backward()
    return [leaf.grad for leaf in leaves]


def weighted_loss(hidden: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor) -> Tensor:
    """Σ token_weight·nll of the logits as `linear` rounds them, in float32 at least."""
    logits = linear(hidden, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return (cross_entropy(logits, labels, reduction="none") * token_weight).sum()


def loss_grads(loss, hidden: Tensor, weight: Tensor, labels: Tensor, token_weight: Tensor) -> tuple[Tensor, ...]:
    """Of hidden and weight, where `loss` has the arguments of `weighted_loss`."""
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    return torch.autograd.grad(loss(*leaves, labels, token_weight=token_weight), leaves)


class Terms(NamedTuple):
    """What an entry of a gradient is measured by.

    The magnitude is the sum of the magnitudes of the terms that the entry is a sum of. It is the entry itself for
    nll and lse off the label, so that the error is relative there. At the label p − 1 cancels, entropy's
    p·(log p + entropy) and mixed upstream gradients cross zero, and the softcap's 1 − tanh² cancels: no arithmetic in
    the dtype of the entry is exact relative to the entry there, and all of it is exact relative to the terms.
    """

    magnitude: Tensor
    floor: Tensor  # what a smaller magnitude counts as
    classes: dict[str, Tensor]  # masks: each class has a yardstick of its own


def logit_terms(x: Tensor, labels: Tensor, upstream, logit_scale: float = 1.0, softcap: float | None = None) -> Terms:
    """Of the gradient of logits ``x [.., V]``: classes are labels, and the other entries over and under `SMALL`."""
    z = scaled(x.double(), logit_scale, softcap)
    g_nll, g_entropy, g_lse = (g.double().abs().masked_fill(labels == -100, 0).unsqueeze(-1) for g in upstream)
    log_p = torch.log_softmax(z, -1)
    p = log_p.exp()
    label = torch.arange(x.shape[-1], device=labels.device) == labels.unsqueeze(-1)
    of_entropy = torch.where(p == 0, 0.0, p * (log_p.abs() - torch.xlogy(p, p).sum(-1, keepdim=True)))
    magnitude = (g_nll + g_lse) * p + g_entropy * of_entropy + g_nll * label
    if softcap is not None:
        magnitude = magnitude * (1 + (z / softcap) ** 2)
    magnitude = magnitude * abs(logit_scale)
    row = (g_nll + g_entropy + g_lse) * abs(logit_scale)
    small = magnitude < SMALL * row
    classes = {"label": label, "small": small & ~label, "other": ~small & ~label}
    return Terms(magnitude, FLOOR * row, classes)


def linear_terms(hidden, weight, bias, labels, upstream, **scaling) -> tuple[Terms, Terms, Terms | None]:
    """Of the gradients of hidden, weight and bias: the logits' magnitudes through the products' magnitudes.

    The classes of weight and bias are the rows of the labels and all the others, whose gradients are as small as p.
    """
    hidden, weight = hidden.double(), weight.double()
    logits = linear(hidden, weight, None if bias is None else bias.double())
    of_logits = logit_terms(logits, labels, upstream, **scaling)
    magnitude, floor = of_logits.magnitude, of_logits.floor.expand_as(logits)
    is_label = of_logits.classes["label"].any(0).unsqueeze(-1)

    def rows(magnitude: Tensor, floor: Tensor, mask: Tensor) -> Terms:
        return Terms(magnitude, floor, {"label": mask.expand_as(magnitude), "other": ~mask.expand_as(magnitude)})

    of_hidden = magnitude @ weight.abs()
    return (
        Terms(of_hidden, of_logits.floor * weight.abs().amax(0), {"all": torch.ones_like(of_hidden, dtype=torch.bool)}),
        rows(magnitude.T @ hidden.abs(), floor.T @ hidden.abs(), is_label),
        None if bias is None else rows(magnitude.sum(0), floor.sum(0), is_label.squeeze(-1)),
    )


def entry_errors(actual: Tensor, truth: Tensor, terms: Terms) -> Tensor:
    """Per entry, of the sum of its terms' magnitudes; any error at all is infinite where there are no terms."""
    difference = (actual.double() - truth.double()).abs()
    return torch.where(difference == 0, 0.0, difference / torch.maximum(terms.magnitude, terms.floor))


def epsilon_of(dtype: torch.dtype, ulps: float) -> float:
    return torch.finfo(dtype).eps * (ULPS_OF_FLOAT64 if dtype == torch.float64 else ulps)


def assert_grad_no_worse(name: str, actual: Tensor, torch_same: Tensor, truth: Tensor, terms: Terms) -> None:
    """In every class of entries, our largest error within PyTorch's largest plus `ULPS` of the dtype.

    Raises AssertionError also where PyTorch's error is too large to be a yardstick: an entry wrong by one part in a
    thousand must never pass.
    """
    assert torch.isfinite(actual).all(), f"{name} is not finite"
    epsilon = epsilon_of(actual.dtype, ULPS)
    ours, theirs = (entry_errors(x, truth, terms) for x in (actual, torch_same))
    for label, mask in terms.classes.items():
        if mask.any():
            error, yardstick = ours[mask].max().item(), theirs[mask].max().item()
            assert yardstick <= 5e-4, f"{name}, {label}: PyTorch's own error is {yardstick:.3g}"
            assert error <= yardstick + epsilon, (
                f"{name}, {label}: error {error:.3g} of an entry's terms, PyTorch's {yardstick:.3g} + {epsilon:.1g}"
            )


def assert_grad_rounded_once(name: str, actual: Tensor, truth: Tensor, terms: Terms, ulps: float = 0.51):
    """A half-precision gradient is the truth rounded once, after float32 arithmetic of `ULPS` of its terms."""
    assert torch.isfinite(actual).all(), f"{name} is not finite"
    finfo = torch.finfo(actual.dtype)
    exponent = torch.frexp(truth.double().abs().clamp(min=finfo.smallest_normal)).exponent
    spacing = finfo.eps * torch.exp2((exponent - 1).double())
    arithmetic = ULPS * torch.finfo(torch.float32).eps * torch.maximum(terms.magnitude, terms.floor)
    excess = (actual.double() - truth.double()).abs() - ulps * spacing - arithmetic
    # rows without upstream gradients are exactly 0
    wrong = (excess > 0) | ((terms.floor == 0) & (actual != 0))
    assert not wrong.any(), f"{name}: {excess.max().item():.3g} over {ulps} units in the last place"


def row_scales(hidden, weight, bias, labels, upstream, **scaling) -> list[tuple[Tensor, Tensor]]:
    """Of each row of the gradients of hidden, weight and bias: its largest sum of magnitudes, at least the floor.

    Magnitudes of the exact gradient of the logits, which is rounded once: p − 1 as it is, not the 1 that p nearly is.
    The second of each pair is what float32 leaves open: p is a number near 1 there, so that p − 1 is known to a few
    2⁻²⁴, whatever the dtype of the logits.
    """
    hidden, weight = hidden.double(), weight.double()
    logits = torch.nn.functional.linear(hidden, weight, None if bias is None else bias.double())
    (grad,) = grads(lambda x: stats(x, labels, **scaling), [logits], upstream)
    terms = linear_terms(hidden, weight, bias, labels, upstream, **scaling)
    sums = [grad.abs() @ weight.abs(), grad.abs().T @ hidden.abs(), grad.abs().sum(0)]
    pairs = [(x, t) for x, t in zip(sums, terms, strict=True) if t is not None]
    both = [(torch.maximum(x, t.floor.expand_as(x)), 8 * 2.0**-24 * t.magnitude) for x, t in pairs]
    return [tuple(x.amax(-1) if x.dim() == 2 else x for x in pair) for pair in both]


def assert_rows_no_worse(
    name: str, actual: Tensor, torch_same: Tensor, truth: Tensor, scales: tuple[Tensor, Tensor], ulps: float = 1.0
) -> None:
    """Half-precision products: in every row, within PyTorch's error at the same dtype plus `ulps` of the row's scale.

    A row's error is its largest, in units in the last place of its scale, ours less what float32 leaves open
    (`row_scales`). PyTorch's is the largest among rows whose scale has the same power of ten: a vocabulary entry that
    is improbable everywhere has a small row in the head's gradient, which a bound by the tensor's scale would not see.
    """
    assert torch.isfinite(actual).all(), f"{name} is not finite"
    finfo = torch.finfo(actual.dtype)
    scale, left_open = scales[0].clamp(min=finfo.smallest_normal), scales[1]
    unit = finfo.eps * torch.exp2((torch.frexp(scale).exponent - 1).double())
    errors = [(x.double() - truth.double()).abs().reshape(len(scale), -1).amax(-1) for x in (actual, torch_same)]
    errors = [(errors[0] - left_open) / unit, errors[1] / unit]
    decades = scale.log10().floor()
    for decade in decades.unique():
        error, yardstick = (x[decades == decade].max().item() for x in errors)
        assert error <= yardstick + ulps, (
            f"{name}, rows of scale 1e{int(decade)}: error {error:.3g} units in the last place, PyTorch's "
            f"{yardstick:.3g} + {ulps}"
        )


# statistics in nats: a confident token's nll and entropy, a token's that hesitates, all others
BOUNDS = (0.0, 1e-2, 1.0, torch.inf)


def assert_no_worse(name: str, actual: Tensor, torch_same: Tensor, truth: Tensor, epsilon: float | None = None):
    """Statistics: in every class of size, our largest error within PyTorch's largest plus epsilon.

    Errors are relative over 1 nat. Under it they are absolute: log_sum is the logarithm of a sum that holds 1, whose
    spacing is the dtype's eps, so that a confident token's nll of 1e-4 is exact to that in any arithmetic, PyTorch's
    too. The default epsilon is 4 such spacings, 8 over 1 nat; the classes keep the error of a large value from being
    the yardstick of a confident token's.
    """
    assert torch.isfinite(actual).all(), f"{name} is not finite"
    truth = truth.double()
    size = truth.abs()
    ours, theirs = ((x.double() - truth).abs() / size.clamp(min=1.0) for x in (actual, torch_same))
    for low, high in itertools.pairwise(BOUNDS):
        mask = (size >= low) & (size < high)
        if mask.any():
            allowed = epsilon or epsilon_of(actual.dtype, 8 if low >= 1 else 4)
            error, yardstick = ours[mask].max().item(), theirs[mask].max().item()
            assert error <= yardstick + allowed, (
                f"{name} in [{low}, {high}): error {error:.3g}, PyTorch's {yardstick:.3g} + {allowed:.1g}"
            )


def assert_no_finite_maximum(operators, dtype: torch.dtype, size: int, scaling: tuple):
    """Rows of nothing but −inf, with a +inf, and with a NaN, also beside a +inf, are as in PyTorch's logsumexp;
    −inf − (−inf) would make lse NaN. Under a softcap an infinite logit is a finite z.

    Args:
        operators: a namespace of `torch.ops` with the row operators.
        scaling: ignore_index, logit_scale and softcap.
    """
    high = -torch.inf if scaling[1] < 0 else torch.inf
    logits = torch.randn(1, 8, size).to(dtype)
    logits[0, 0] = -high
    for row, position in enumerate((0, size // 2, size - 1), 1):
        logits[0, row, position] = high
        logits[0, row + 3, position] = torch.nan
    logits[0, 7, 0], logits[0, 7, -1] = high, torch.nan
    labels = torch.zeros(1, 8, dtype=torch.long)
    nll, entropy, row_max, log_sum = statistics = operators.token_stats(logits, labels, *scaling)
    lse = torch.logsumexp(scaled(logits.double(), *scaling[1:]), -1)
    torch.testing.assert_close(row_max.double() + log_sum, lse, equal_nan=True, rtol=1e-6, atol=1e-6)
    infinite = torch.isinf(row_max)
    assert infinite[0].tolist() == [scaling[2] is None] * 4 + [False] * 4
    assert (log_sum[infinite] == 0).all()
    assert torch.isnan(nll[infinite]).all()
    assert torch.isnan(entropy[infinite]).all()
    assert all(torch.isnan(x[0, 4:]).all() for x in statistics)
    ones = [torch.ones(1, 8, dtype=nll.dtype)] * 3
    grad = operators.token_stats_backward(logits, labels, *statistics[1:], *ones, *scaling)
    assert torch.isnan(grad[0, 4:]).all()
