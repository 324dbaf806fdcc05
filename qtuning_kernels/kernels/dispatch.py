"""The operators: one schema and one fake each, and the choice of the backend that serves them.

Every backend is a table of plain functions with the operator's name and signature. Nothing here knows
autograd (`functional.py`) or policy (`pruning/`).

Shapes at this level are normal forms that `functional.py` and `pruning/` produce:

- ``logits [A, C, V]``, any strides with a dense last dimension; per-token tensors ``[A, C]``, contiguous;
- ``hidden [N, H]``, ``weight [V, H]``, ``bias [V]``, per-token tensors ``[N]``, all contiguous;
- labels int32 or int64. A label outside ``[0, V) ∪ {ignore_index}`` gives NaN, never a read out of bounds;
- statistics are float32, or float64 for float64 input. ``lse = row_max + log_sum``: backward needs both
  parts, since their rounded sum has lost ``log_sum`` at a large common offset (docs/method.md, "Per token").
"""

import functools
import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

_SCALING = "int ignore_index, float logit_scale, float? softcap"
_STATS = "Tensor entropy, Tensor row_max, Tensor log_sum"
_UPSTREAM = "Tensor? grad_nll, Tensor? grad_entropy, Tensor? grad_lse"
_LINEAR = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels"

SCHEMAS = {
    # one read of the logits: -> nll, entropy, row_max, log_sum
    "token_stats": f"(Tensor logits, Tensor labels, {_SCALING}) -> (Tensor, Tensor, Tensor, Tensor)",
    # -> gradient of the logits, in their dtype, contiguous
    "token_stats_backward": f"(Tensor logits, Tensor labels, {_STATS}, {_UPSTREAM}, {_SCALING}) -> Tensor",
    # the same, written over the logits
    "token_stats_backward_": f"(Tensor(a!) logits, Tensor labels, {_STATS}, {_UPSTREAM}, {_SCALING}) -> ()",
    # the same statistics from hidden states: -> nll, entropy, row_max, log_sum
    "linear_token_stats": f"({_LINEAR}, {_SCALING}) -> (Tensor, Tensor, Tensor, Tensor)",
    # -> gradients of hidden, weight, bias; one that `needs` does not ask for has no elements
    "linear_token_stats_backward": f"({_LINEAR}, {_STATS}, {_UPSTREAM}, {_SCALING}, bool[3] needs)"
    " -> (Tensor, Tensor, Tensor)",
    # Σ token_weight·nll, and its gradients at once: -> loss, gradients of hidden, weight, bias
    "linear_cross_entropy": f"({_LINEAR}, Tensor? token_weight, {_SCALING}, bool[3] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    # per-segment mean of each row of values [C, T]: -> float32 [C, B], NaN for an empty segment
    "segment_means": "(Tensor values, Tensor cu_seqlens) -> Tensor",
    # stage 1: -> quadrant int8, role int8, keep bool, kept_index int64 [k], supplemented bool, alpha
    "triage_rank": "(Tensor ppl, Tensor entropy, int k) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    # stage 2: the num_keep[b] tokens of each segment with the lowest (or highest) neighbour score -> bool [T]
    "select_tokens": "(Tensor ppl, Tensor cu_seqlens, Tensor num_keep, float neighbor_weight,"
    " bool keep_high, bool neighbor_mean) -> Tensor",
}

# which backends serve a device, best first
_SERVES = {"cpu": ("native", "reference"), "cuda": ("triton", "cuda", "reference")}
BACKENDS = ("reference", "native", "triton", "cuda")
ORDER_REASON = {
    "cuda": "triton has a kernel for every operator, cuda for those without a matrix product and needs no compiler"
    " at run time; which of them is faster has not been measured on a GPU"
}


class BackendUnavailableError(RuntimeError):
    """A backend that was asked for cannot serve here; the message says why and how to get it."""


@functools.cache
def _table(name: str) -> dict[str, Callable] | BackendUnavailableError:
    """The backend's functions by operator name, or why there are none."""
    try:
        if name == "reference":
            from qtuning_kernels.kernels import reference as module
        elif name == "native":
            from qtuning_kernels.kernels import native as module
        elif name == "cuda":
            from qtuning_kernels.kernels import cuda as module
        else:
            from qtuning_kernels import triton_kernels as module
    except BackendUnavailableError as error:
        return error
    return {operator: getattr(module, operator) for operator in SCHEMAS}


def unavailable_reason(name: str) -> str | None:
    """Why the backend `name` cannot be used in this process; None if it can."""
    entry = _table(name)
    return str(entry) if isinstance(entry, BackendUnavailableError) else None


def default_order(device: torch.device | str) -> tuple[str, ...]:
    """The backends that serve `device`, in the order in which they are tried; `ORDER_REASON` says why."""
    return _SERVES.get(torch.device(device).type, ("reference",))


def backend(device: torch.device | str = "cpu") -> str:
    """The name of the backend that serves tensors on `device`.

    The environment variable ``QTUNING_BACKEND`` forces one of ``reference``, ``native`` (CPU), ``triton`` (CUDA
    and ROCm; CPU tensors under ``TRITON_INTERPRET=1``) and ``cuda`` (CUDA; CPU tensors with a library that
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
        if forced not in ("reference", *_SERVES.get(device_type, ())) and not interpreted:
            accepted = ", ".join(_SERVES.get(device_type, ("reference",)))
            hint = "; triton serves cpu under TRITON_INTERPRET=1" if forced == "triton" else ""
            raise BackendUnavailableError(
                f"QTUNING_BACKEND={forced} does not serve device {device_type!r}; accepted: {accepted}{hint}"
            )
        return forced
    candidates = _SERVES.get(device_type, ("reference",))
    chosen = next(name for name in candidates if unavailable_reason(name) is None)
    if chosen == "reference" != candidates[0]:
        warnings.warn(
            f"{device_type} tensors are served by the slow {chosen!r} backend, because "
            f"{candidates[0]!r} is not available: {unavailable_reason(candidates[0])} "
            f"(QTUNING_BACKEND={chosen} asks for it by name and silences this)",
            stacklevel=2,
        )
    return chosen


def _dispatcher(operator: str) -> Callable:
    def call(*args):
        chosen = _choose(args[0].device.type, os.environ.get("QTUNING_BACKEND", ""))
        return _table(chosen)[operator](*args)

    return call


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics: float64 for float64 input, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake_token_stats(logits, labels, *_):
    return tuple(logits.new_empty(labels.shape, dtype=stats_dtype(logits.dtype)) for _ in range(4))


def _fake_linear_token_stats(hidden, weight, bias, labels, *_):
    return _fake_token_stats(hidden, labels)


def _fake_grads(hidden, weight, bias, needs):
    def like(tensor: Tensor | None, needed: bool) -> Tensor:
        return torch.empty_like(tensor) if needed and tensor is not None else hidden.new_empty(0)

    return like(hidden, needs[0]), like(weight, needs[1]), like(bias, needs[2])


def _fake_linear_token_stats_backward(hidden, weight, bias, *rest):
    return _fake_grads(hidden, weight, bias, rest[-1])


def _fake_linear_cross_entropy(hidden, weight, bias, *rest):
    loss = hidden.new_empty((), dtype=stats_dtype(hidden.dtype))
    return loss, *_fake_grads(hidden, weight, bias, rest[-1])


def _fake_triage_rank(ppl, entropy, k):
    size = ppl.shape[0]
    return (
        ppl.new_empty(size, dtype=torch.int8),
        ppl.new_empty(size, dtype=torch.int8),
        ppl.new_empty(size, dtype=torch.bool),
        ppl.new_empty(k, dtype=torch.int64),
        ppl.new_empty(size, dtype=torch.bool),
        ppl.new_empty((), dtype=torch.float32),
    )


_FAKES = {
    "token_stats": _fake_token_stats,
    "token_stats_backward": lambda logits, *_: torch.empty_like(logits, memory_format=torch.contiguous_format),
    "token_stats_backward_": lambda *_: None,
    "linear_token_stats": _fake_linear_token_stats,
    "linear_token_stats_backward": _fake_linear_token_stats_backward,
    "linear_cross_entropy": _fake_linear_cross_entropy,
    "segment_means": lambda values, cu_seqlens: values.new_empty(
        (values.shape[0], cu_seqlens.shape[0] - 1), dtype=torch.float32
    ),
    "triage_rank": _fake_triage_rank,
    "select_tokens": lambda ppl, *_: torch.empty_like(ppl, dtype=torch.bool),
}

_library = torch.library.Library("qtuning_kernels", "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)
    _library.impl(_name, _dispatcher(_name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"qtuning_kernels::{_name}", _FAKES[_name], lib=_library)
