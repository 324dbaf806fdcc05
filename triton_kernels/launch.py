"""What every launcher shares: the device that a kernel runs on, and how a row of logits is addressed."""

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

# Whether a product and a sum become one rounding: the compiler's default has changed between releases, so it is
# said at every launch.
FUSED = {"enable_fp_fusion": True}
UNFUSED = {"enable_fp_fusion": False}


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's device current, as Triton launches on the current one; nothing to do in the interpreter."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def multiprocessors(tensor: Tensor) -> int:
    """Multiprocessors (compute units) of the tensor's device; an H100's number in the interpreter."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 132


def warp_size(tensor: Tensor) -> int:
    """Lanes of a warp (64 in a wavefront of AMD's Instinct cards)."""
    return torch.cuda.get_device_properties(tensor.device).warp_size if tensor.is_cuda else 32


class Rows(NamedTuple):
    """How a kernel finds the rows of ``logits [A, C, V]`` from an aligned address."""

    base: Tensor  # starts at a multiple of 16 bytes
    shift: int  # elements from there to the first logit
    vector: int  # elements that 16 bytes hold; 1 if the memory begins unaligned, so that nothing can be rounded down


def rows_of(logits: Tensor) -> Rows:
    """An address divisible by 16 bytes at or before the first logit, whatever view `logits` is."""
    vector = 16 // logits.element_size()
    excess = logits.data_ptr() % 16
    shift = excess // logits.element_size()
    if excess % logits.element_size() or shift > logits.storage_offset():
        return Rows(logits, 0, 1)
    if shift == 0:
        return Rows(logits, 0, vector)
    base = logits.as_strided((shift + 1,), (1,), logits.storage_offset() - shift)
    return Rows(base, shift, vector)
