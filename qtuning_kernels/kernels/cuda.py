"""The CUDA C++ backend for CUDA tensors: the kernels of `csrc/cuda`, compiled when the package was installed.

No compiler at run time and no warm-up. ``QTUNING_CUDA_EMULATOR`` names a library in which the same kernels and the same
binding run on CPU tensors (tests/cuda_emulator); it is then loaded instead.
"""

import os

import torch

from qtuning_kernels.kernels.contract import RowOperators
from qtuning_kernels.kernels.extension import load_extension

if emulator := os.environ.get("QTUNING_CUDA_EMULATOR"):
    torch.ops.load_library(emulator)
else:
    load_extension("_cuda", "cuda_build.json", "a CUDA build of PyTorch, and nvcc")
_registered = RowOperators("qtuning_cuda")
token_stats = _registered.token_stats
token_stats_backward = _registered.token_stats_backward
token_stats_backward_ = _registered.token_stats_backward_
