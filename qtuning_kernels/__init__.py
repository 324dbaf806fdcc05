"""Q-Tuning: fine-tune on the samples and tokens that teach, with kernels that read the logits once."""

import importlib
from typing import TYPE_CHECKING, Any

from qtuning_kernels.config import QTuningConfig
from qtuning_kernels.kernels.contract import BackendUnavailableError
from qtuning_kernels.kernels.dispatch import backend
from qtuning_kernels.kernels.functional import TokenStats, token_stats
from qtuning_kernels.kernels.linear import linear_cross_entropy, linear_token_stats
from qtuning_kernels.pruning import EUPlane, Triage, eu_plane, prune_tokens, triage_samples

if TYPE_CHECKING:
    from qtuning_kernels.training.loop import select_batch
    from qtuning_kernels.training.mixin import QTuningMixin
    from qtuning_kernels.training.sft import QTuningSFTTrainer
    from qtuning_kernels.training.trainer import QTuningTrainer

__version__ = "0.1.0"
__all__ = [
    "BackendUnavailableError",
    "EUPlane",
    "QTuningConfig",
    "QTuningMixin",
    "QTuningSFTTrainer",
    "QTuningTrainer",
    "TokenStats",
    "Triage",
    "backend",
    "eu_plane",
    "linear_cross_entropy",
    "linear_token_stats",
    "prune_tokens",
    "select_batch",
    "token_stats",
    "triage_samples",
]


# import transformers or TRL, which users of the kernels need not have loaded
_LATE = {
    "QTuningMixin": "qtuning_kernels.training.mixin",
    "QTuningSFTTrainer": "qtuning_kernels.training.sft",
    "QTuningTrainer": "qtuning_kernels.training.trainer",
    "select_batch": "qtuning_kernels.training.loop",
}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(importlib.import_module(_LATE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
