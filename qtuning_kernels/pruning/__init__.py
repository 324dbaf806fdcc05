"""The pruning policy: pure functions on vectors of length B and T.

They compose as ``eu_plane`` → ``triage_samples`` → ``prune_tokens``. None of them waits for the device, and
none knows a model or a logit.
"""

from qtuning_kernels.pruning.plane import EUPlane, eu_plane
from qtuning_kernels.pruning.tokens import prune_tokens
from qtuning_kernels.pruning.triage import Triage, triage_samples

__all__ = ["EUPlane", "Triage", "eu_plane", "prune_tokens", "triage_samples"]
