"""Statistics and loss from hidden states with autograd; `linear_chunks.py` has the operators."""

from typing import Any

import torch
from torch import Tensor

from qtuning_kernels.arguments import check_labels, check_scaling, check_tensor, is_readable
from qtuning_kernels.kernels import linear_chunks  # noqa: F401 - registers the operators
from qtuning_kernels.kernels.contract import DTYPES, IGNORE_INDEX, stats_dtype
from qtuning_kernels.kernels.functional import TokenStats, contiguous, once

_operators = torch.ops.qtuning_kernels


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> TokenStats:
    """`token_stats` of ``hidden @ weight.T + bias``, of which only a chunk exists at a time.

    The logits are rounded to the operands' dtype, as `torch.nn.functional.linear` rounds them, and statistics and
    gradients read these same numbers. Under autocast the operands are cast as `linear` casts them. Backward computes
    the logits again, for the rows alone that have an upstream gradient; off the CPU, finding them waits for the
    device once.

    Args:
        hidden: ``[.., H]``, hidden states that enter the language-model head.
        weight: ``[V, H]``, the head's weight, of the dtype of `hidden`.
        labels: ``[..]``, int32 or int64, each in ``[0, V)`` or `ignore_index`.
        bias: ``[V]`` or None.
        ignore_index, logit_scale, softcap: as in `token_stats`.

    Returns:
        `TokenStats`, each of the labels' shape, float32 (float64 for float64 input), in nats; differentiable once
        with respect to hidden, weight and bias.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as `token_stats`.
    """
    hidden, weight, bias = _operands(hidden, weight, bias, labels, ignore_index, logit_scale, softcap)
    stats = _LinearTokenStats.apply(
        hidden, weight, bias, labels.reshape(-1).contiguous(), ignore_index, logit_scale, softcap
    )
    return TokenStats(*(x.view(labels.shape) for x in stats))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """``Σ token_weight·nll`` from hidden states, for weights that are known beforehand.

    Loss and gradients come from the same pass over chunks of logits, which are rounded as in `linear_token_stats`.
    Rows of weight 0 take no part: no arithmetic is spent on them, and their gradient is exactly 0. Off the CPU,
    finding them waits for the device once; without `token_weight` nothing waits. In float16 the gradients come from a
    pass of their own in backward, which waits, with the loss scale in the weights: without it they would underflow.

    Args:
        hidden, weight, labels, bias, ignore_index, logit_scale, softcap: as in `linear_token_stats`.
        token_weight: ``[..]``, the labels' shape, floating; no gradient flows to it. None: 1 for every token.

    Returns:
        0-d float32 (float64 for float64 input): a sum, in nats times the weights' unit. Pass ``1 / kept
        tokens`` as the weights to get the mean.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as `token_stats`; a `token_weight` that requires a gradient.
    """
    hidden, weight, bias = _operands(hidden, weight, bias, labels, ignore_index, logit_scale, softcap)
    if token_weight is not None:
        check_tensor("token_weight", token_weight, DTYPES, like=labels)
        if token_weight.shape != labels.shape:
            raise ValueError(
                f"token_weight has shape {list(token_weight.shape)}; accepted: the labels', {list(labels.shape)}"
            )
        if token_weight.requires_grad:
            raise ValueError(
                "token_weight requires a gradient; accepted: weights that are constants of this loss "
                "(linear_token_stats gives a nll that can be weighted differentiably)"
            )
        token_weight = token_weight.reshape(-1).to(stats_dtype(hidden.dtype)).contiguous()
    mask = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    labels = labels.reshape(-1).contiguous()
    return _LinearCrossEntropy.apply(
        hidden, weight, bias, labels, token_weight, ignore_index, logit_scale, softcap, mask
    )


class _LinearTokenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, *scaling):
        nll, entropy, row_max, log_sum = _operators.linear_token_stats(hidden, weight, bias, labels, *scaling)
        ctx.save_for_backward(hidden, weight, bias, labels, entropy, row_max, log_sum)
        ctx.scaling = scaling
        ctx.set_materialize_grads(False)
        return nll, entropy.clone(), row_max + log_sum

    @staticmethod
    def backward(ctx, *grads):
        saved, mask = ctx.saved_tensors, list(ctx.needs_input_grad[:3])
        with torch.no_grad():
            upstream = [contiguous(g, saved[3].shape) for g in grads]
            gradients = _operators.linear_token_stats_backward(*saved, *upstream, *ctx.scaling, mask)
        return *_asked_for("linear_token_stats", saved, gradients, mask), None, None, None, None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, token_weight, *scaling_and_mask):
        ctx.settings = scaling_and_mask
        *scaling, mask = scaling_and_mask
        # float16 has no room for the gradients of small weights until a loss scale has multiplied these
        early = hidden.dtype != torch.float16
        loss, *gradients = _operators.linear_cross_entropy(
            hidden, weight, bias, labels, token_weight, *scaling, mask if early else [False] * 3
        )
        ctx.compiled = early and torch.compiler.is_compiling()
        if ctx.compiled:
            ctx.save_for_backward(*gradients)
        else:
            ctx.save_for_backward(hidden, weight, bias, labels, token_weight)
            ctx.gradients = gradients if early else None
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        mask = ctx.settings[-1]
        if ctx.compiled:
            gradients = [(g * grad_loss).to(g.dtype) for g in ctx.saved_tensors]
            return *(g if asked else None for g, asked in zip(gradients, mask, strict=True)), *[None] * 6
        saved = ctx.saved_tensors
        with torch.no_grad():
            if ctx.gradients is None:
                *operands, labels, token_weight = saved
                weights = grad_loss.expand(labels.shape) if token_weight is None else token_weight * grad_loss
                _, *gradients = _operators.linear_cross_entropy(*operands, labels, weights.contiguous(), *ctx.settings)
            else:
                # handed out, so that a head's gradient is not copied; a second backward computes its own
                gradients, ctx.gradients = ctx.gradients, None
                # on a CPU the value is at hand, and the usual 1 need not cost a pass over the head's gradient
                if not (is_readable(grad_loss) and grad_loss.item() == 1.0):
                    gradients = [g.mul_(grad_loss) for g in gradients]
        return *_asked_for("linear_cross_entropy", saved, gradients, mask), *[None] * 6


def _asked_for(name: str, inputs: Any, gradients: list[Tensor], mask: list[bool]) -> list[Tensor | None]:
    triples = zip(inputs[:3], gradients, mask, strict=True)
    return [once(name, x, g) if asked else None for x, g, asked in triples]


def _operands(hidden, weight, bias, labels, ignore_index, logit_scale, softcap):
    """hidden [N, H], weight and bias after checks, contiguous, in autocast's dtype where autocast is on."""
    operands = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, tensor in operands.items():
        check_tensor(name, tensor, DTYPES, like=hidden)
    if hidden.dim() == 0 or weight.dim() != 2 or weight.shape[0] == 0 or hidden.shape[-1] != weight.shape[1]:
        sharded = " (a sharded head has to be gathered first)" if weight.numel() == 0 else ""
        raise ValueError(
            f"hidden has shape {list(hidden.shape)} and weight {list(weight.shape)}; "
            f"accepted: [.., H] and [V, H] with V >= 1{sharded}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {list(bias.shape)}; accepted: [V], {list(weight.shape[:1])}")
    device_type = hidden.device.type
    casts = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)  # not for meta
    if casts and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        operands = {name: tensor.to(dtype) for name, tensor in operands.items()}
    for name, tensor in operands.items():
        if tensor.dtype != operands["hidden"].dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}; accepted: that of hidden, {hidden.dtype}")
    check_labels(labels, hidden.shape[:-1], weight.shape[0], ignore_index, hidden.device, "hidden")
    check_scaling(logit_scale, softcap)
    hidden = operands["hidden"]
    rows = hidden.reshape(labels.numel(), hidden.shape[-1])  # H may be 0
    return rows.contiguous(), operands["weight"].contiguous(), None if bias is None else operands["bias"].contiguous()
