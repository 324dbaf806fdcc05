"""The C++ backend for CPU tensors: the functions of `csrc/`, if they were built."""

from qtuning_kernels.ops import BackendUnavailableError

raise BackendUnavailableError("the extension qtuning_kernels._C is not part of this installation")
