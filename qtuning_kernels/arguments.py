"""Checks of arguments: every message names the argument, the value that came and what is accepted."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64)


def check_vector(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], like: Tensor | None = None) -> None:
    """Raise unless `tensor` is a vector of an accepted dtype, on the device of `like`.

    Raises:
        TypeError: not a tensor.
        ValueError: another rank, dtype or device.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; accepted: a tensor")
    if tensor.dim() != 1:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; accepted: one dimension")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {tensor.dtype}; accepted: {', '.join(map(str, dtypes))}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} is on device {tensor.device}; accepted: {like.device}, as the others")


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
    readable = cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()
    if not readable or type(cu_seqlens) is not Tensor:  # a fake tensor has no values
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
