"""Float32 products of hidden states and weights through oneDNN, on CPUs.

PyTorch multiplies float32 matrices with MKL, which leaves the wide vectors of other makers' processors unused; oneDNN,
which it uses for bfloat16 and in compiled models, does not. Same precision, another order of summation.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


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


class _OneDNN(TorchFunctionMode):
    """Within it, `torch.nn.functional.linear` of plain float32 tensors on a CPU goes through oneDNN."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is nn.functional.linear and not torch.compiler.is_compiling():
            operands = _operands(*args, **(kwargs or {}))
            if _served(*operands):
                return _Linear.apply(*operands)
        return function(*args, **(kwargs or {}))


def _operands(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def _served(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    tensors = [x, weight] if bias is None else [x, weight, bias]
    plain = all(
        type(t) in (Tensor, nn.Parameter) and t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors
    )
    return plain and x.dim() > 1 and x.numel() > 0 and not torch.is_autocast_enabled("cpu")


def onednn_linear(module: nn.Module) -> AbstractContextManager:
    """A context for the forwards of `module` in which its float32 linear layers run through oneDNN.

    It changes nothing where the module is not on a CPU, where PyTorch has no MKL to replace, where oneDNN is off
    (`torch.backends.mkldnn`), and where activations are checkpointed: they are computed again in the backward, outside
    of the context, and have to save the same tensors there.
    """
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    parameter = next(module.parameters(), None)
    elsewhere = parameter is not None and parameter.device.type != "cpu"
    if elsewhere or not both or not torch.backends.mkldnn.enabled:
        return nullcontext()
    checkpointed = any(getattr(part, "gradient_checkpointing", False) for part in module.modules())
    return nullcontext() if checkpointed else _OneDNN()
