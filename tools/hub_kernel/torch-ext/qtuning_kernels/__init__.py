"""Per-token statistics of logits, and their gradient, in Triton."""

from .kernels.dispatch import row_operators
from .kernels.functional import TokenStats, token_stats

__all__ = ["TokenStats", "row_operators", "token_stats"]
