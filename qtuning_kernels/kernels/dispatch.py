"""The row operators as PyTorch operators: one schema and one fake each, and the choice of the backend that serves.

`row_operators` has the contract's functions and goes through PyTorch's dispatcher, so that `torch.compile` and fake
tensors see one operator each.
"""

import functools
import importlib
import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import cast

import torch

from qtuning_kernels.kernels.contract import (
    BackendUnavailableError,
    RowOperators,
    RowStats,
    Scaling,
    Upstream,
    stats_dtype,
)

_MODULES = {
    "reference": "qtuning_kernels.kernels.reference",
    "native": "qtuning_kernels.kernels.native",
    "triton": "qtuning_kernels.triton_kernels",
    "cuda": "qtuning_kernels.kernels.cuda",
}
BACKENDS = tuple(_MODULES)
# which backends serve a device, best first
_SERVES = {
    "cpu": ("native", "reference"),
    "cuda": ("triton", "cuda", "reference"),
    "xpu": ("triton", "reference"),
    "mps": ("reference",),
}
ORDER_REASON = {
    "cuda": "cuda needs no compiler at run time; `make gpu` measures which of them is faster",
    "xpu": "triton where it is installed; Intel's GPUs are not among those that were tried",
    "mps": "Apple's GPUs have neither Triton nor CUDA",
}


@functools.cache
def _module(name: str) -> ModuleType | BackendUnavailableError:
    """The backend's module, or why there is none."""
    try:
        return importlib.import_module(_MODULES[name])
    except BackendUnavailableError as error:
        return error


def unavailable_reason(name: str) -> str | None:
    """Why the backend `name` cannot be used in this process; None if it can."""
    module = _module(name)
    return str(module) if isinstance(module, BackendUnavailableError) else None


def default_order(device: torch.device | str) -> tuple[str, ...]:
    """The backends that serve `device`, in the order in which they are tried; `ORDER_REASON` says why."""
    return _SERVES.get(torch.device(device).type, ("reference",))


def backend(device: torch.device | str = "cpu") -> str:
    """The name of the backend that serves tensors on `device`.

    The environment variable ``QTUNING_BACKEND`` forces one of ``reference``, ``native`` (CPU), ``triton`` (CUDA,
    ROCm and xpu; CPU tensors under ``TRITON_INTERPRET=1``) and ``cuda`` (CUDA; CPU tensors with a library that
    ``QTUNING_CUDA_EMULATOR`` names). Without it the first one of the device's order that is built is taken, and
    a warning says so if that is only the reference.

    Raises:
        ValueError: ``QTUNING_BACKEND`` names no backend.
        BackendUnavailableError: the forced backend is not built here or does not serve `device`.
    """
    return _choose(torch.device(device).type, os.environ.get("QTUNING_BACKEND", ""))


@functools.cache
def _choose(device_type: str, forced: str) -> str:
    if forced:
        if forced not in BACKENDS:
            raise ValueError(f"QTUNING_BACKEND={forced!r} is not a backend; accepted: {', '.join(BACKENDS)}")
        if reason := unavailable_reason(forced):
            raise BackendUnavailableError(f"QTUNING_BACKEND={forced} cannot be used: {reason}")
        interpreted = device_type == "cpu" and (
            (forced == "triton" and os.environ.get("TRITON_INTERPRET") == "1")
            or (forced == "cuda" and "QTUNING_CUDA_EMULATOR" in os.environ)
        )
        if forced not in ("reference", *default_order(device_type)) and not interpreted:
            accepted = ", ".join(default_order(device_type))
            hint = "; triton serves cpu under TRITON_INTERPRET=1" if forced == "triton" else ""
            raise BackendUnavailableError(
                f"QTUNING_BACKEND={forced} does not serve device {device_type!r}; accepted: {accepted}{hint}"
            )
        return forced
    candidates = default_order(device_type)
    chosen = next(name for name in candidates if unavailable_reason(name) is None)
    if chosen == "reference" != candidates[0]:
        warnings.warn(
            f"{device_type} tensors are served by the slow {chosen!r} backend, because "
            f"{candidates[0]!r} is not available: {unavailable_reason(candidates[0])} "
            f"(QTUNING_BACKEND={chosen} asks for it by name and silences this)",
            stacklevel=2,
        )
    return chosen


def serving(device: torch.device) -> RowOperators:
    """The row operators of the backend that serves `device`."""
    return cast(RowOperators, _module(backend(device)))


# arguments that several schemas share
SCALING = "int ignore_index, float logit_scale, float? softcap"
STATS = "Tensor entropy, Tensor row_max, Tensor log_sum"
UPSTREAM = "Tensor? grad_nll, Tensor? grad_entropy, Tensor? grad_lse"
SCHEMAS = {
    # -> nll, entropy, row_max, log_sum
    "token_stats": f"(Tensor logits, Tensor labels, {SCALING}) -> (Tensor, Tensor, Tensor, Tensor)",
    "token_stats_backward": f"(Tensor logits, Tensor labels, {STATS}, {UPSTREAM}, {SCALING}) -> Tensor",
    "token_stats_backward_": f"(Tensor(a!) logits, Tensor labels, {STATS}, {UPSTREAM}, {SCALING}) -> ()",
}


def _token_stats(logits, labels, ignore_index, logit_scale, softcap):
    nll, stats = serving(logits.device).token_stats(logits, labels, ignore_index, Scaling(logit_scale, softcap))
    return nll, *stats


def _token_stats_backward(logits, labels, *rest):
    stats, upstream, (ignore_index, *scaling) = RowStats(*rest[:3]), Upstream(*rest[3:6]), rest[6:]
    return serving(logits.device).token_stats_backward(logits, labels, stats, upstream, ignore_index, Scaling(*scaling))


def _token_stats_backward_(logits, labels, *rest):
    stats, upstream, (ignore_index, *scaling) = RowStats(*rest[:3]), Upstream(*rest[3:6]), rest[6:]
    serving(logits.device).token_stats_backward_(logits, labels, stats, upstream, ignore_index, Scaling(*scaling))


def _fake_token_stats(logits, labels, *_):
    return tuple(logits.new_empty(labels.shape, dtype=stats_dtype(logits.dtype)) for _ in range(4))


def _fake_token_stats_backward(logits, *_):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _fake_token_stats_backward_(*_):
    return None


_library = torch.library.Library("qtuning_kernels", "DEF")


def register(name: str, schemas: dict[str, str], implementation: Callable, fake: Callable) -> None:
    """Define ``torch.ops.qtuning_kernels.<name>`` for every device, and what it gives for fake tensors."""
    _library.define(name + schemas[name])
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qtuning_kernels::{name}", fake, lib=_library)


register("token_stats", SCHEMAS, _token_stats, _fake_token_stats)
register("token_stats_backward", SCHEMAS, _token_stats_backward, _fake_token_stats_backward)
register("token_stats_backward_", SCHEMAS, _token_stats_backward_, _fake_token_stats_backward_)
row_operators = RowOperators("qtuning_kernels")
