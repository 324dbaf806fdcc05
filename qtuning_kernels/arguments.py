"""Checks of arguments: every message names the argument, the value that came and what is accepted."""

import math

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64)


def is_readable(tensor: Tensor) -> bool:
    """Whether the host can read values without waiting: not of other devices, nor of fake or traced tensors."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    return plain and tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_tensor(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], like: Tensor | None = None) -> None:
    """Raise unless `tensor` is a tensor of an accepted dtype, on the device of `like`.

    Raises:
        TypeError: not a tensor.
        ValueError: another dtype or device.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; accepted: a tensor")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {tensor.dtype}; accepted: {', '.join(map(str, dtypes))}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} is on device {tensor.device}; accepted: {like.device}, as the others")


def check_labels(
    labels: Tensor, shape: torch.Size, size: int, ignore_index: int, device: torch.device, owner: str
) -> None:
    """Raise unless `labels` has the shape and the device of the rows of `owner`, and lies in ``[0, size)``.

    Raises:
        TypeError, ValueError: no tensor; another shape, dtype or device.
        IndexError: a label outside; where the host cannot read it, an assertion on the device.
    """
    check_tensor("labels", labels, (torch.int64, torch.int32))
    if labels.shape != shape:
        raise ValueError(
            f"labels has shape {list(labels.shape)}; accepted: that of {owner} without its last dimension, "
            f"{list(shape)}"
        )
    if labels.device != device:
        raise ValueError(f"labels is on device {labels.device}; accepted: that of {owner}, {device}")
    if torch.compiler.is_compiling() or device.type == "meta" or labels.numel() == 0:
        return
    outside = ((labels < 0) | (labels >= size)) & (labels != ignore_index)
    if not is_readable(labels):
        if device.type != "cpu":
            torch._assert_async(~outside.any(), f"labels must be in [0, {size}) or ignore_index={ignore_index}")
    elif outside.any():
        first = int(outside.reshape(-1).nonzero()[0])
        raise IndexError(
            f"labels[{first}] (flattened) is {labels.reshape(-1)[first].item()}; "
            f"accepted: [0, {size}) or ignore_index={ignore_index}"
        )


def check_scaling(logit_scale: float, softcap: float | None) -> None:
    """Raise ValueError unless the scale is finite and not 0, and the cap None or finite and positive."""
    if torch.compiler.is_compiling():  # numbers are symbols there
        return
    if not math.isfinite(logit_scale) or logit_scale == 0:
        raise ValueError(f"logit_scale is {logit_scale}; accepted: a finite number other than 0")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap is {softcap}; accepted: a finite number above 0, or None")


def check_vector(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], like: Tensor | None = None) -> None:
    """Raise unless `tensor` is a vector of an accepted dtype, on the device of `like`.

    Raises:
        TypeError: not a tensor.
        ValueError: another rank, dtype or device.
    """
    check_tensor(name, tensor, dtypes, like)
    if tensor.dim() != 1:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; accepted: one dimension")


def check_same_length(name: str, tensor: Tensor, length: int, meaning: str) -> None:
    """Raise ValueError unless the vector has `length` entries."""
    if tensor.shape[0] != length:
        raise ValueError(f"{name} has {tensor.shape[0]} entries; accepted: {length}, {meaning}")


def check_cu_seqlens(cu_seqlens: Tensor, tokens: Tensor) -> None:
    """Raise unless `cu_seqlens` is an int32 prefix sum for the vector `tokens`.

    Its values are read for tensors in host memory alone: reading them elsewhere would wait for the device.
    """
    check_vector("cu_seqlens", cu_seqlens, (torch.int32,), like=tokens)
    if cu_seqlens.shape[0] == 0:
        raise ValueError("cu_seqlens is empty; accepted: B+1 entries, the first of them 0")
    if not is_readable(cu_seqlens):
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != tokens.shape[0]:
        raise ValueError(
            f"cu_seqlens runs from {first} to {last}; accepted: from 0 to the number of tokens, {tokens.shape[0]}"
        )
    if bool((cu_seqlens.diff() < 0).any()):
        at = int((cu_seqlens.diff() < 0).int().argmax())
        pair = cu_seqlens[at : at + 2].tolist()
        raise ValueError(f"cu_seqlens falls from {pair[0]} to {pair[1]} at entry {at + 1}; accepted: non-decreasing")


def _check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r}; accepted: a number")


def check_ratio(name: str, value: float) -> None:
    """Raise unless `value` is a number in (0, 1]."""
    _check_number(name, value)
    if not 0 < value <= 1:
        raise ValueError(f"{name} is {value!r}; accepted: a number in (0, 1]")


def check_weight(name: str, value: float) -> None:
    """Raise unless `value` is a number in [0, 1]."""
    _check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value!r}; accepted: a number in [0, 1]")


def check_interval(name: str, value: float, least: float, below: float) -> None:
    """Raise unless `value` is a number in [least, below)."""
    _check_number(name, value)
    if not least <= value < below:
        raise ValueError(f"{name} is {value!r}; accepted: a number in [{least}, {below})")


def check_count(name: str, value: int, least: int) -> None:
    """Raise unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; accepted: an integer")
    if value < least:
        raise ValueError(f"{name} is {value}; accepted: an integer of at least {least}")


def check_flag(name: str, value: bool) -> None:
    """Raise unless `value` is a boolean."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; accepted: True or False")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; accepted: {', '.join(map(repr, choices))}")
