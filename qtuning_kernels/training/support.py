"""In which trainers a selection cannot work."""

import warnings
from typing import Any

import torch


def refuse_unsupported(trainer: Any) -> None:
    """Raise `ValueError` for a pool of one and for wrappers in which a selection cannot work; warn of half weights."""
    pool = trainer.args.per_device_train_batch_size
    if trainer.qtuning.selection_scope == "global":
        pool *= trainer.args.world_size
    if pool < 2 and getattr(trainer.policy, "sample_ratio", 1) < 1:
        raise ValueError(
            f"per_device_train_batch_size is {trainer.args.per_device_train_batch_size}, the selection pool, and of a "
            "pool of one nothing can be pruned; accepted: 2 or more (the paper uses 8)"
        )
    if trainer.args.n_gpu > 1:
        raise ValueError("nn.DataParallel is not supported; start one process per GPU, with torchrun or accelerate")
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    for name in ("tp", "cp", "sp"):
        if getattr(parallelism, f"{name}_enabled", False):
            raise ValueError(
                f"parallelism_config has {name}_size {getattr(parallelism, f'{name}_size')}; accepted: 1, since a "
                "sample has to be scored whole by one process"
            )
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if trainer.args.fsdp and not trainer.is_fsdp_enabled:
        raise ValueError("fsdp is set, and accelerate, which has none on CPUs, passes over it; accepted: without it")
    if trainer.is_fsdp_enabled and getattr(plugin, "fsdp_version", 1) != 2:
        raise ValueError("fsdp_version is 1; accepted: 2, whose modules gather their parameters one by one")
    half = [n for n, p in trainer.model.named_parameters() if p.requires_grad and p.dtype != torch.float32]
    if half:
        warnings.warn(
            f"{len(half)} trainable parameters are not float32 (first: {half[0]}): with half-precision "
            "master weights most updates of a fine-tuning run round to nothing. Load the model with "
            "dtype=torch.float32 and set bf16=True for mixed precision.",
            stacklevel=3,
        )
