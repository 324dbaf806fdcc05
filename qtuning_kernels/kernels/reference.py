"""Every operator in plain PyTorch, for any dtype and device: the specification in code.

What the kernels are tested against, and the backend of that name. It follows docs/method.md line by line and
makes no attempt to be fast or small. Shapes as in `ops.py`.
"""

import torch
from torch import Tensor

from qtuning_kernels.kernels.dispatch import stats_dtype
from qtuning_kernels.pruning.rank import segment_means, select_tokens, triage_rank  # noqa: F401 - the others


def _scaled(logits: Tensor, logit_scale: float, softcap: float | None) -> Tensor:
    """z = softcap·tanh(logit_scale·x / softcap), or logit_scale·x, in the statistics' dtype."""
    z = logits.to(stats_dtype(logits.dtype)) * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _one_hot_column(labels: Tensor, size: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """The label as an index that is always in bounds, and the masks of ignored and of impossible labels."""
    labels = labels.long()
    ignored = labels == ignore_index
    impossible = ~ignored & ((labels < 0) | (labels >= size))
    return labels.masked_fill(ignored | impossible, 0).unsqueeze(-1), ignored, impossible


def token_stats(
    logits: Tensor, labels: Tensor, ignore_index: int, logit_scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """nll, entropy, row_max, log_sum per token, in nats; 0 where the label is `ignore_index`."""
    z = _scaled(logits, logit_scale, softcap)
    column, ignored, impossible = _one_hot_column(labels, logits.shape[-1], ignore_index)
    row_max = z.amax(-1)
    shifted = z - row_max.unsqueeze(-1)
    exp = shifted.exp()
    total = exp.sum(-1)  # S
    weighted = torch.where(exp == 0, 0.0, shifted * exp).sum(-1)  # T, where 0·−inf counts as 0
    log_sum = total.log()
    nll = log_sum - shifted.gather(-1, column).squeeze(-1)
    entropy = log_sum - weighted / total
    nll = nll.masked_fill(impossible, torch.nan)
    return tuple(x.masked_fill(ignored, 0.0) for x in (nll, entropy, row_max, log_sum))


def token_stats_backward(
    logits: Tensor,
    labels: Tensor,
    entropy: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    grad_nll: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    """g_nll (p − 1[y]) − g_entropy p (log p + entropy) + g_lse p, times dz/dx.

    A row whose upstream gradients are all 0, or whose label is ignored, is exactly 0 whatever it holds.
    """
    z = _scaled(logits, logit_scale, softcap)
    column, ignored, impossible = _one_hot_column(labels, logits.shape[-1], ignore_index)
    zero = torch.zeros_like(entropy)
    g_nll, g_entropy, g_lse = (zero if g is None else g for g in (grad_nll, grad_entropy, grad_lse))

    log_p = (z - row_max.unsqueeze(-1)) - log_sum.unsqueeze(-1)
    p = log_p.exp()
    surprise = torch.where(p == 0, 0.0, p * (log_p + entropy.unsqueeze(-1)))
    grad = (g_nll + g_lse).unsqueeze(-1) * p - g_entropy.unsqueeze(-1) * surprise
    grad = grad.scatter_add(-1, column, -g_nll.unsqueeze(-1))
    if softcap is not None:
        grad = grad * (1 - (z / softcap) ** 2)
    grad = (grad * logit_scale).masked_fill(impossible.unsqueeze(-1), torch.nan)
    pruned = ignored | ((g_nll == 0) & (g_entropy == 0) & (g_lse == 0))
    return grad.masked_fill(pruned.unsqueeze(-1), 0.0).to(logits.dtype)


def token_stats_backward_(logits: Tensor, *args) -> None:
    """`token_stats_backward`, written over the logits."""
    logits.copy_(token_stats_backward(logits, *args))


def _project(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The logits [1, N, V] that the language-model head would give, in the hidden states' dtype."""
    return torch.nn.functional.linear(hidden, weight, bias).unsqueeze(0)


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`token_stats` of ``hidden @ weight.T + bias``."""
    logits = _project(hidden, weight, bias)
    stats = token_stats(logits, labels.unsqueeze(0), ignore_index, logit_scale, softcap)
    return tuple(x.squeeze(0) for x in stats)


def _project_backward(
    grad_logits: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    # a row that is exactly 0 must stay so against a non-finite hidden state
    dead = (grad_logits == 0).all(-1, keepdim=True)
    return (
        grad_logits @ weight if needs[0] else hidden.new_empty(0),
        grad_logits.T @ hidden.masked_fill(dead, 0.0) if needs[1] else hidden.new_empty(0),
        grad_logits.sum(0) if needs[2] and bias is not None else hidden.new_empty(0),
    )


def linear_token_stats_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    entropy: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    grad_nll: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; an empty tensor for each that `needs` leaves out."""
    row = [None if x is None else x.unsqueeze(0) for x in (grad_nll, grad_entropy, grad_lse)]
    grad_logits = token_stats_backward(
        _project(hidden, weight, bias),
        labels.unsqueeze(0),
        *(x.unsqueeze(0) for x in (entropy, row_max, log_sum)),
        *row,
        ignore_index,
        logit_scale,
        softcap,
    ).squeeze(0)
    return _project_backward(grad_logits, hidden, weight, bias, needs)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    token_weight: Tensor | None,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Σ token_weight·nll and its gradients. A row of weight 0 counts as absent, whatever it holds."""
    nll, entropy, row_max, log_sum = linear_token_stats(
        hidden, weight, bias, labels, ignore_index, logit_scale, softcap
    )
    upstream = torch.ones_like(nll) if token_weight is None else token_weight.to(nll.dtype)
    loss = (upstream * nll.masked_fill(upstream == 0, 0.0)).sum()
    grads = linear_token_stats_backward(
        hidden,
        weight,
        bias,
        labels,
        entropy,
        row_max,
        log_sum,
        upstream,
        None,
        None,
        ignore_index,
        logit_scale,
        softcap,
        needs,
    )
    return loss, *grads
