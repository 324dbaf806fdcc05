"""What every launcher shares: the device that a kernel runs on, and how a row of logits is addressed."""

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Whether a product and a sum become one rounding: the compiler's default has changed between releases, so it is
# said at every launch.
FUSED = {"enable_fp_fusion": True}

# decided, as by @triton.jit, when this module is imported
INTERPRETED = triton.knobs.runtime.interpret
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x in `dtype`, rounded to nearest even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        # the interpreter would truncate
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = tl.where(x == x, (bits & 0xFFFF0000).to(tl.float32, bitcast=True), float("nan"))
    return x.to(dtype)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's device current, as Triton launches on the current one; nothing to do in the interpreter."""
    if tensor.is_cpu:
        return contextlib.nullcontext()
    return getattr(torch, tensor.device.type).device(tensor.device)


def architecture(tensor: Tensor) -> str:
    """What configurations depend on: "sm_90", "gfx942" and the like, "xpu", or "interpreter"."""
    if not tensor.is_cuda:
        return "interpreter" if tensor.is_cpu else tensor.device.type
    properties = torch.cuda.get_device_properties(tensor.device)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def warp_size(arch: str) -> int:
    """Lanes of a warp; a wavefront of AMD's Instinct cards has 64."""
    return 64 if arch.startswith("gfx9") else 32


def row_config(vocabulary: int, block: int, arch: str) -> dict[str, int]:
    """256 threads for a block of so many elements; where a row is shorter, fewer: the others would work on padding.

    At 32 registers eight such blocks fill a multiprocessor, and that hides the latency of memory; software pipelining
    would only cost registers.
    """
    warp, threads = warp_size(arch), 256
    while threads > warp and vocabulary <= block // 2:
        block, threads = block // 2, threads // 2
    return {"BLOCK": block, "num_warps": threads // warp, "num_stages": 1}


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
