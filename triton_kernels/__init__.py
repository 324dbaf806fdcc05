"""The Triton backend for CUDA and ROCm tensors (and CPU tensors in the interpreter): one module per operator.

The row operators of `qtuning_kernels/kernels/contract.py`. Imported as `qtuning_kernels.triton_kernels`.
"""

from qtuning_kernels.kernels.contract import BackendUnavailableError

try:
    import triton  # noqa: F401
except ImportError as error:
    raise BackendUnavailableError(
        f"the package triton cannot be imported ({error}); get it with: pip install 'qtuning-kernels[triton]'"
    ) from error

from qtuning_kernels.triton_kernels.token_stats import token_stats
from qtuning_kernels.triton_kernels.token_stats_backward import token_stats_backward, token_stats_backward_

__all__ = [
    "token_stats",
    "token_stats_backward",
    "token_stats_backward_",
]
