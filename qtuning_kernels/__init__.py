"""Q-Tuning: fine-tune on the samples and tokens that teach, with kernels that read the logits once."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qtuning_kernels.config import QTuningConfig
    from qtuning_kernels.kernels.contract import BackendUnavailableError
    from qtuning_kernels.kernels.dispatch import backend
    from qtuning_kernels.kernels.functional import TokenStats, token_stats
    from qtuning_kernels.kernels.linear import linear_cross_entropy, linear_token_stats
    from qtuning_kernels.pruning import EUPlane, Triage, eu_plane, prune_tokens, triage_samples
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


# imported when first asked for: PyTorch, transformers and TRL take seconds each, and not every user needs them all
_MODULES = {
    "config": ("QTuningConfig",),
    "kernels.contract": ("BackendUnavailableError",),
    "kernels.dispatch": ("backend",),
    "kernels.functional": ("TokenStats", "token_stats"),
    "kernels.linear": ("linear_cross_entropy", "linear_token_stats"),
    "pruning": ("EUPlane", "Triage", "eu_plane", "prune_tokens", "triage_samples"),
    "training.loop": ("select_batch",),
    "training.mixin": ("QTuningMixin",),
    "training.sft": ("QTuningSFTTrainer",),
    "training.trainer": ("QTuningTrainer",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
