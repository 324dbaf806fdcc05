"""Selection policies: from the statistics of a pool to what is trained on. Each is a pure function on the host."""

from qtuning_kernels.pruning.policies.protocol import Decision, Policy, PoolStats
from qtuning_kernels.pruning.policies.registry import POLICIES, make_policy

__all__ = ["POLICIES", "Decision", "Policy", "PoolStats", "make_policy"]
