"""The Triton backend for CUDA and ROCm tensors (and CPU tensors in the interpreter): one module per operator.

Imported as `qtuning_kernels.triton_kernels`.
"""

from qtuning_kernels.kernels.dispatch import BackendUnavailableError

try:
    import triton  # noqa: F401
except ImportError as error:
    raise BackendUnavailableError(
        f"the package triton cannot be imported ({error}); get it with: pip install 'qtuning-kernels[triton]'"
    ) from error

from qtuning_kernels.triton_kernels.linear_cross_entropy import linear_cross_entropy
from qtuning_kernels.triton_kernels.linear_token_stats import linear_token_stats
from qtuning_kernels.triton_kernels.linear_token_stats_backward import linear_token_stats_backward
from qtuning_kernels.triton_kernels.segment_means import segment_means
from qtuning_kernels.triton_kernels.select_tokens import select_tokens
from qtuning_kernels.triton_kernels.token_stats import token_stats
from qtuning_kernels.triton_kernels.token_stats_backward import token_stats_backward, token_stats_backward_
from qtuning_kernels.triton_kernels.triage_rank import triage_rank

__all__ = [
    "linear_cross_entropy",
    "linear_token_stats",
    "linear_token_stats_backward",
    "segment_means",
    "select_tokens",
    "token_stats",
    "token_stats_backward",
    "token_stats_backward_",
    "triage_rank",
]
