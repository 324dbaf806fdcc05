"""Q-Tuning: fine-tune on the samples and tokens that teach, with kernels that read the logits once."""

from qtuning_kernels.functional import TokenStats, linear_cross_entropy, linear_token_stats, token_stats
from qtuning_kernels.ops import BackendUnavailableError, backend

__version__ = "0.1.0"
__all__ = [
    "BackendUnavailableError",
    "TokenStats",
    "backend",
    "linear_cross_entropy",
    "linear_token_stats",
    "token_stats",
]
