"""What the operators must equal, written without them: plain PyTorch, in float64 or in any other dtype.

The criterion everywhere: our error against float64 may not exceed the error that PyTorch itself makes at the
same dtype, plus a stated epsilon. Half-precision inputs are held to PyTorch's float32 arithmetic on the same
values, since statistics are accumulated in float32.
"""

import torch
from torch import Tensor

EPSILON = 1e-6


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


def objective(outputs, upstream) -> Tensor:
    """Σ upstream·output: backward from it hands each token its own upstream gradients."""
    return sum((o * g.to(o.dtype)).sum() for o, g in zip(outputs, upstream, strict=True))


def grads(function, inputs, upstream) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    objective(function(*leaves), upstream).backward()
    return [leaf.grad for leaf in leaves]


def error(actual: Tensor, truth: Tensor) -> float:
    """Largest absolute error, relative where the truth's scale is over 1."""
    if actual.numel() == 0:
        return 0.0
    return ((actual.double() - truth.double()).abs() / truth.double().abs().clamp(min=1.0)).max().item()


def assert_no_worse(name: str, actual: Tensor, torch_same: Tensor, truth: Tensor, epsilon: float = EPSILON):
    assert torch.isfinite(actual).all(), f"{name} is not finite"
    ours, theirs = error(actual, truth), error(torch_same, truth)
    assert ours <= theirs + epsilon, f"{name}: error {ours:.3g}, PyTorch's {theirs:.3g} + {epsilon:.0e}"


def assert_rounded_once(name: str, actual: Tensor, truth: Tensor, ulps: float = 0.51):
    """A half-precision result is the truth rounded once: within half a unit in the last place."""
    spacing = torch.finfo(actual.dtype).eps * truth.double().abs().clamp(min=torch.finfo(actual.dtype).tiny)
    floor = 1e-7 if actual.dtype == torch.float16 else 1e-9  # float16 is subnormal below 6e-5
    excess = ((actual.double() - truth.double()).abs() - ulps * spacing - floor).max().item()
    assert excess <= 0, f"{name}: {excess:.3g} over {ulps} units in the last place"
