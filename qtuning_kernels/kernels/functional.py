"""Per-token statistics and losses with autograd: argument checks, normal forms, `torch.autograd.Function`.

The operators below (`ops.py`) do the arithmetic; docs/method.md, "Per token", has the formulas.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qtuning_kernels.kernels import dispatch as ops

_ops = torch.ops.qtuning_kernels
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class TokenStats(NamedTuple):
    """Per-token statistics in nats, each of the labels' shape; 0 where the label is ignored."""

    nll: Tensor
    entropy: Tensor
    lse: Tensor


def token_stats(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    inplace_backward: bool = False,
) -> TokenStats:
    """Negative log-likelihood, entropy and log-sum-exp of each token, in one read of the logits.

    With ``z = softcap·tanh(logit_scale·x / softcap)`` (or ``logit_scale·x``) and ``p = softmax(z)``:
    ``nll = −log p[label]``, ``entropy = −Σ p log p``, ``lse = log Σ e^z``, all differentiable. A token whose
    upstream gradients are all 0 is pruned: its row of the gradient is exactly 0 and costs only that.

    Args:
        logits: ``[.., V]``, float32, bfloat16, float16 or float64; the last dimension dense, any strides
            before it (a shifted view ``logits[:, :-1]`` is not copied).
        labels: ``[..]``, int32 or int64, each in ``[0, V)`` or `ignore_index`.
        ignore_index: the label of tokens that have no statistics (0) and no gradient (exactly 0).
        logit_scale: factor on the logits, before the cap.
        softcap: cap of the logits, as in Gemma 2.
        inplace_backward: let backward turn `logits` into its own gradient. It saves a buffer of their size;
            the logits' values are gone afterwards.

    Returns:
        `TokenStats`, each of the labels' shape, float32 (float64 for float64 logits), in nats.

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype, device or layout, named in the message.
        IndexError: a label outside the vocabulary (on a GPU a device-side assertion).

    Source: docs/method.md, "Per token".
    """
    _check_tensor("logits", logits, _FLOATS)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be [.., V] with V >= 1, got shape {list(logits.shape)}")
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(
            f"logits must have a dense last dimension, got strides {list(logits.stride())}; pass logits.contiguous()"
        )
    if inplace_backward and any(s == 0 and n > 1 for s, n in zip(logits.stride(), logits.shape, strict=True)):
        raise ValueError(
            f"inplace_backward=True needs logits without expanded dimensions, got strides {list(logits.stride())}"
        )
    _check_labels(labels, logits.shape[:-1], logits.shape[-1], ignore_index, logits.device, "logits")
    _check_scaling(logit_scale, softcap)
    return TokenStats(*_TokenStats.apply(logits, labels, ignore_index, float(logit_scale), softcap, inplace_backward))


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> TokenStats:
    """`token_stats` of ``hidden @ weight.T + bias``, without ever holding these logits.

    Under autocast the operands are cast as `torch.nn.functional.linear` casts them.

    Args:
        hidden: ``[.., H]``, hidden states that enter the language-model head.
        weight: ``[V, H]``, the head's weight, of the dtype of `hidden`.
        labels: ``[..]``, int32 or int64, each in ``[0, V)`` or `ignore_index`.
        bias: ``[V]`` or None.
        ignore_index, logit_scale, softcap: as in `token_stats`.

    Returns:
        `TokenStats`, each of the labels' shape, float32 (float64 for float64 input), in nats; differentiable
        with respect to hidden, weight and bias (backward computes the logits again, kept rows only).

    Raises:
        TypeError, ValueError, IndexError: as `token_stats`.
    """
    hidden, weight, bias = _linear_operands(hidden, weight, bias, labels, ignore_index, logit_scale, softcap)
    stats = _LinearTokenStats.apply(
        hidden.reshape(-1, hidden.shape[-1]).contiguous(),
        weight,
        bias,
        labels.reshape(-1).contiguous(),
        ignore_index,
        float(logit_scale),
        softcap,
    )
    return TokenStats(*(x.view(labels.shape) for x in stats))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """``Σ token_weight·nll`` from hidden states, for weights that are known beforehand.

    Loss and gradients come from the same pass over chunks of logits. Rows of weight 0 take no part: no
    arithmetic is spent on them, and their gradient is exactly 0.

    Args:
        hidden, weight, labels, bias, ignore_index, logit_scale, softcap: as in `linear_token_stats`.
        token_weight: ``[..]``, the labels' shape, floating; no gradient flows to it. None: 1 for every token.

    Returns:
        0-d float32 (float64 for float64 input): a sum, in nats times the weights' unit. Pass ``1 / kept
        tokens`` as the weights to get the mean.

    Raises:
        TypeError, ValueError, IndexError: as `token_stats`; a `token_weight` that requires a gradient.
    """
    hidden, weight, bias = _linear_operands(hidden, weight, bias, labels, ignore_index, logit_scale, softcap)
    if token_weight is not None:
        _check_tensor("token_weight", token_weight, _FLOATS)
        if token_weight.shape != labels.shape or token_weight.device != labels.device:
            raise ValueError(
                f"token_weight must have the labels' shape {list(labels.shape)} and device {labels.device}, "
                f"got {list(token_weight.shape)} on {token_weight.device}"
            )
        if token_weight.requires_grad:
            raise ValueError(
                "token_weight must not require a gradient: weights are constants of this loss; "
                "use linear_token_stats for a differentiable weighting"
            )
        token_weight = token_weight.reshape(-1).to(ops.stats_dtype(hidden.dtype)).contiguous()
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    return _LinearCrossEntropy.apply(
        hidden.reshape(-1, hidden.shape[-1]).contiguous(),
        weight,
        bias,
        labels.reshape(-1).contiguous(),
        token_weight,
        ignore_index,
        float(logit_scale),
        softcap,
        needs,
    )


def _rows(logits: Tensor) -> Tensor:
    """The logits as [A, C, V], a view."""
    if logits.dim() <= 3:
        return logits[(None,) * (3 - logits.dim())]
    try:
        return logits.view(-1, *logits.shape[-2:])
    except RuntimeError as error:
        raise ValueError(
            f"logits of shape {list(logits.shape)} and strides {list(logits.stride())} are no view of "
            "[A, C, V]; pass logits.contiguous()"
        ) from error


def _as_rows(x: Tensor | None, shape: torch.Size) -> Tensor | None:
    return None if x is None else x.reshape(shape).contiguous()


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, ignore_index, logit_scale, softcap, inplace_backward):
        rows = _rows(logits)
        row_labels = _as_rows(labels, rows.shape[:-1])
        nll, entropy, row_max, log_sum = _ops.token_stats(rows, row_labels, ignore_index, logit_scale, softcap)
        ctx.save_for_backward(logits, row_labels, entropy, row_max, log_sum)
        ctx.scaling = (ignore_index, logit_scale, softcap)
        ctx.inplace_backward = inplace_backward
        ctx.set_materialize_grads(False)
        # saved and returned tensors must be distinct, so that a caller may change what it got
        return tuple(x.view(labels.shape) for x in (nll, entropy.clone(), row_max + log_sum))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_nll, grad_entropy, grad_lse):
        logits, labels, *stats = ctx.saved_tensors
        rows = _rows(logits)
        upstream = [_as_rows(g, rows.shape[:-1]) for g in (grad_nll, grad_entropy, grad_lse)]
        if ctx.inplace_backward:
            _ops.token_stats_backward_(rows, labels, *stats, *upstream, *ctx.scaling)
            return logits, None, None, None, None, None
        grad = _ops.token_stats_backward(rows, labels, *stats, *upstream, *ctx.scaling)
        return grad.view(logits.shape), None, None, None, None, None


class _LinearTokenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, ignore_index, logit_scale, softcap):
        nll, entropy, row_max, log_sum = _ops.linear_token_stats(
            hidden, weight, bias, labels, ignore_index, logit_scale, softcap
        )
        ctx.save_for_backward(hidden, weight, bias, labels, entropy, row_max, log_sum)
        ctx.scaling = (ignore_index, logit_scale, softcap)
        ctx.set_materialize_grads(False)
        return nll, entropy.clone(), row_max + log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_nll, grad_entropy, grad_lse):
        upstream = [_as_rows(g, ctx.saved_tensors[3].shape) for g in (grad_nll, grad_entropy, grad_lse)]
        needs = list(ctx.needs_input_grad[:3])
        grads = _ops.linear_token_stats_backward(*ctx.saved_tensors, *upstream, *ctx.scaling, needs)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None, None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, token_weight, ignore_index, logit_scale, softcap, needs):
        loss, *grads = _ops.linear_cross_entropy(
            hidden, weight, bias, labels, token_weight, ignore_index, logit_scale, softcap, needs
        )
        ctx.save_for_backward(*(g if need else None for g, need in zip(grads, needs, strict=True)))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        grads = ctx.saved_tensors
        # on a CPU the value is at hand, and the usual 1 need not cost a pass over the head's gradient
        if torch.compiler.is_compiling() or grad_loss.device.type != "cpu" or grad_loss.item() != 1.0:
            grads = [g if g is None else (g * grad_loss).to(g.dtype) for g in grads]
        return *grads, None, None, None, None, None, None


def _linear_operands(hidden, weight, bias, labels, ignore_index, logit_scale, softcap):
    """The operands after checks, in autocast's dtype where autocast is on."""
    named = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, tensor in named.items():
        _check_tensor(name, tensor, _FLOATS)
    if hidden.dim() == 0 or weight.dim() != 2 or weight.shape[0] == 0 or hidden.shape[-1] != weight.shape[1]:
        empty = " (is the head sharded? gather it first)" if weight.numel() == 0 else ""
        raise ValueError(
            "hidden must be [.., H] and weight [V, H] with V >= 1, "
            f"got {list(hidden.shape)} and {list(weight.shape)}{empty}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [V] = {list(weight.shape[:1])}, got {list(bias.shape)}")
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype != hidden.dtype or tensor.device != hidden.device):
            raise ValueError(
                f"{name} must have the dtype and device of hidden, {hidden.dtype} on {hidden.device}, "
                f"got {tensor.dtype} on {tensor.device}"
            )
    _check_labels(labels, hidden.shape[:-1], weight.shape[0], ignore_index, hidden.device, "hidden")
    _check_scaling(logit_scale, softcap)
    return hidden, weight.contiguous(), bias if bias is None else bias.contiguous()


def _check_tensor(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        accepted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{name} has dtype {tensor.dtype}; accepted: {accepted}")


def _check_labels(labels, shape, size, ignore_index, device, owner) -> None:
    _check_tensor("labels", labels, (torch.int64, torch.int32))
    if labels.shape != shape:
        raise ValueError(
            f"labels must have the shape of {owner} without its last dimension, {list(shape)}, got {list(labels.shape)}"
        )
    if labels.device != device:
        raise ValueError(f"labels must be on the device of {owner}, {device}, got {labels.device}")
    if torch.compiler.is_compiling() or device.type == "meta" or labels.numel() == 0:
        return
    bad = ((labels < 0) | (labels >= size)) & (labels != ignore_index)
    if device.type != "cpu":  # reading the answer would make the host wait
        torch._assert_async(~bad.any(), f"labels must be in [0, {size}) or ignore_index={ignore_index}")
    elif bad.any():
        first = bad.reshape(-1).nonzero()[0].item()
        raise IndexError(
            f"labels[{first}] (flattened) is {labels.reshape(-1)[first].item()}; "
            f"accepted: [0, {size}) or ignore_index={ignore_index}"
        )


def _check_scaling(logit_scale: float, softcap: float | None) -> None:
    if not math.isfinite(logit_scale) or logit_scale == 0:
        raise ValueError(f"logit_scale must be finite and not 0, got {logit_scale}")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap must be finite and positive, or None, got {softcap}")
