"""Per-token statistics of logits with autograd: argument checks, normal forms, one `torch.autograd.Function`.

`dispatch.py` has the operators below it; docs/method.md, "Per token", has the formulas.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from qtuning_kernels.arguments import check_labels, check_scaling, check_tensor
from qtuning_kernels.kernels.contract import DTYPES, IGNORE_INDEX, RowStats, Scaling, Upstream
from qtuning_kernels.kernels.dispatch import row_operators


class TokenStats(NamedTuple):
    """Per-token statistics in nats, each of the labels' shape; 0 where the label is ignored."""

    nll: Tensor
    entropy: Tensor
    lse: Tensor


def token_stats(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    inplace_backward: bool = False,
) -> TokenStats:
    """Negative log-likelihood, entropy and log-sum-exp of each token, in one read of the logits.

    With ``z = softcap·tanh(logit_scale·x / softcap)`` (or ``logit_scale·x``) and ``p = softmax(z)``:
    ``nll = −log p[label]``, ``entropy = −Σ p log p``, ``lse = log Σ e^z``, all differentiable once. A token whose
    upstream gradients are all 0 is pruned: its row of the gradient is exactly 0 and costs only that.

    Args:
        logits: ``[.., V]``, float32, bfloat16, float16 or float64; the last dimension dense, any strides
            before it (a shifted view ``logits[:, :-1]`` is not copied).
        labels: ``[..]``, int32 or int64, each in ``[0, V)`` or `ignore_index`.
        ignore_index: the label of tokens that have no statistics (0) and no gradient (exactly 0).
        logit_scale: factor on the logits, before the cap; finite and not 0.
        softcap: cap of the logits, as in Gemma 2; finite and positive.
        inplace_backward: let backward turn `logits` into its own gradient. It saves a buffer of their size; the
            logits' values are gone afterwards, and autograd refuses whatever else has saved them.

    Returns:
        `TokenStats`, each of the labels' shape, float32 (float64 for float64 logits), in nats.

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype, device or layout, named in the message.
        IndexError: a label outside the vocabulary (on a GPU a device-side assertion).
        RuntimeError: from backward, for a second derivative.

    Source: docs/method.md, "Per token".
    """
    check_tensor("logits", logits, DTYPES)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits has shape {list(logits.shape)}; accepted: [.., V] with V >= 1")
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(
            f"logits has strides {list(logits.stride())}; accepted: a dense last dimension (pass logits.contiguous())"
        )
    if inplace_backward and _rows_overlap(logits):
        raise ValueError(
            f"logits has shape {list(logits.shape)} and strides {list(logits.stride())}, so that rows share memory; "
            "accepted with inplace_backward=True: rows of their own"
        )
    check_labels(labels, logits.shape[:-1], logits.shape[-1], ignore_index, logits.device, "logits")
    check_scaling(logit_scale, softcap)
    return TokenStats(*_TokenStats.apply(logits, labels, ignore_index, logit_scale, softcap, inplace_backward))


def _rows_overlap(logits: Tensor) -> bool:
    dimensions = [(stride, size) for stride, size in zip(logits.stride(), logits.shape, strict=True) if size > 1]
    for i, (stride, _) in enumerate(dimensions):
        extent = (
            1  # elements from the first to the last one of the dimensions inside; no sort, since sizes may be symbols
        )
        for j, (other, size) in enumerate(dimensions):
            if other < stride or (other == stride and j < i):
                extent += (size - 1) * other
        if stride < extent:
            return True
    return False


def _rows(logits: Tensor) -> Tensor:
    """The logits as [A, C, V], a view."""
    if logits.dim() <= 3:
        return logits[(None,) * (3 - logits.dim())]
    try:
        return logits.view(-1, *logits.shape[-2:])
    except RuntimeError as error:
        raise ValueError(
            f"logits has shape {list(logits.shape)} and strides {list(logits.stride())}; accepted: a view of "
            "[A, C, V] (pass logits.contiguous())"
        ) from error


def contiguous(x: Tensor | None, shape: torch.Size) -> Tensor | None:
    return None if x is None else x.reshape(shape).contiguous()


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, ignore_index, logit_scale, softcap, inplace_backward):
        rows = _rows(logits)
        row_labels = labels.reshape(rows.shape[:-1]).contiguous()
        ctx.settings = ignore_index, Scaling(logit_scale, softcap)
        ctx.inplace_backward = inplace_backward
        nll, stats = row_operators.token_stats(rows, row_labels, *ctx.settings)
        ctx.save_for_backward(logits, row_labels, *stats)
        ctx.set_materialize_grads(False)
        # neither views nor saved tensors, so that a caller may change what it got
        nll, entropy, row_max, log_sum = (x.view(labels.shape) for x in (nll, *stats))
        return nll.clone(), entropy.clone(), row_max + log_sum

    @staticmethod
    def backward(ctx, *grads):
        logits, labels, *stats = ctx.saved_tensors
        rows = _rows(logits)
        upstream = Upstream(*(contiguous(g, rows.shape[:-1]) for g in grads))
        with torch.no_grad():
            if ctx.inplace_backward:
                row_operators.token_stats_backward_(rows, labels, RowStats(*stats), upstream, *ctx.settings)
                if not torch.compiler.is_compiling():
                    increment_version(logits)
                grad = logits.detach()
            else:
                grad = row_operators.token_stats_backward(rows, labels, RowStats(*stats), upstream, *ctx.settings)
                grad = grad.view(logits.shape)
        return once("token_stats", logits, grad), None, None, None, None, None


class _Once(torch.autograd.Function):
    """The identity, whose gradient is an error."""

    @staticmethod
    def forward(ctx, name, anchor, grad):
        ctx.name = name
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(f"{ctx.name} has no second derivative; accepted: one backward through it")


def once(name: str, anchor: Tensor, grad: Any) -> Any:
    """`grad`, of which a further gradient (create_graph=True) is an error instead of silently 0.

    Args:
        name: the function's, for the message.
        anchor: a tensor of its inputs that requires a gradient.
        grad: what its backward gives, computed without a graph.
    """
    if grad is None or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return grad
    return _Once.apply(name, anchor, grad)
