"""The Triton backend for CUDA and ROCm tensors, imported as `qtuning_kernels.triton_kernels`."""

from qtuning_kernels.ops import BackendUnavailableError

raise BackendUnavailableError("no Triton kernel is part of this installation")
