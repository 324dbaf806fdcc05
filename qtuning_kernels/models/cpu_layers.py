"""Linear layers and causal attention of a backbone on CPUs, where PyTorch's own leave most of the processor unused.

PyTorch multiplies float32 matrices with MKL, which leaves the wide vectors of other makers' processors unused; oneDNN,
which it uses for bfloat16 and in compiled models, does not. Its attention multiplies small matrices one call at a time;
the native backend's keeps a block of them in registers (docs/kernels_cpu.md). Same precision, another order of
summation.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qtuning_kernels.kernels.dispatch import backend


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """``x @ weight.T + bias`` for x ``[..., K]``, weight ``[N, K]``, bias ``[N]`` or None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            _product(grad, weight.t()) if of_x else None,
            _product(rows.t(), x.flatten(0, -2).t()) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


class _CausalAttention(torch.autograd.Function):
    """Causal attention of query ``[B, heads, L, D]`` on key and value ``[B, key heads, L, D]``, shaped as query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        return torch.ops.qtuning_native.causal_attention(query, key, value, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *torch.ops.qtuning_native.causal_attention_backward(grad, *ctx.saved_tensors, ctx.scale), None


def _plain(*tensors: Tensor) -> bool:
    return all(type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" and t.numel() > 0 for t in tensors)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """`torch.nn.functional.linear` in float32; NotImplemented for other operands."""
    operands = [input, weight] if bias is None else [input, weight, bias]
    served = _plain(*operands) and all(t.dtype == torch.float32 for t in operands) and input.dim() > 1
    if not served or torch.is_autocast_enabled("cpu"):
        return NotImplemented
    return _Linear.apply(input, weight, bias)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """`torch.nn.functional.scaled_dot_product_attention` of whole causal sequences; NotImplemented for others."""
    if not is_causal or attn_mask is not None or dropout_p > 0 or not _plain(query, key, value):
        return NotImplemented
    tensors = [query, key, value]
    if torch.is_autocast_enabled("cpu"):  # as it treats this function
        tensors = [t if t.dtype == torch.float64 else t.to(torch.get_autocast_dtype("cpu")) for t in tensors]
    if any(t.dim() != 4 or t.stride(3) != 1 for t in tensors) or key.shape != value.shape:
        return NotImplemented
    dtypes = {t.dtype for t in tensors}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.bfloat16, torch.float16}:
        return NotImplemented
    (b, heads, *size), (key_b, key_heads, *key_size) = query.shape, key.shape
    grouped = heads == key_heads or (enable_gqa and heads % key_heads == 0)
    if b != key_b or size != key_size or not grouped:
        return NotImplemented
    return _CausalAttention.apply(*tensors, size[1] ** -0.5 if scale is None else scale)


class _Replacing(TorchFunctionMode):
    """Within it, functions are replaced by others, which may give NotImplemented back."""

    def __init__(self, replacements: dict[Callable, Callable]) -> None:
        self.replacements = replacements

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        replacement = self.replacements.get(function)
        if replacement is not None and not torch.compiler.is_compiling():
            result = replacement(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return function(*args, **(kwargs or {}))


def cpu_layers(module: nn.Module) -> AbstractContextManager:
    """A context for the forwards of `module` in which its layers on a CPU are computed as this file says.

    Linear layers are left to PyTorch where it has no MKL to replace and where oneDNN is off
    (`torch.backends.mkldnn`), attention where another backend than the native one serves the CPU, both where
    activations are checkpointed: they are computed again in the backward, outside of the context, and have to save the
    same tensors there.
    """
    parameter = next(module.parameters(), None)
    elsewhere = parameter is not None and parameter.device.type != "cpu"
    if elsewhere or any(getattr(part, "gradient_checkpointing", False) and part.training for part in module.modules()):
        return nullcontext()
    replacements = {}
    if torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled:
        replacements[nn.functional.linear] = _linear
    if backend("cpu") == "native":
        replacements[nn.functional.scaled_dot_product_attention] = _attention
    return _Replacing(replacements) if replacements else nullcontext()
