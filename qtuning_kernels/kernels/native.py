"""The C++ backend for CPU tensors: the functions of `csrc/`, if they were built."""

import torch

from qtuning_kernels.kernels.contract import RowOperators
from qtuning_kernels.kernels.extension import load_extension

load_extension("_C", "native_build.json", "PyTorch and a C++ compiler")
_registered = RowOperators("qtuning_native")
token_stats = _registered.token_stats
token_stats_backward = _registered.token_stats_backward
token_stats_backward_ = _registered.token_stats_backward_


def instruction_set() -> str:
    """The instruction set that the kernels run with here: baseline, avx2 or avx512.

    Raises:
        ValueError: ``QTUNING_CPU_ISA`` names one that this processor lacks.
    """
    return torch.ops.qtuning_native.instruction_set()
