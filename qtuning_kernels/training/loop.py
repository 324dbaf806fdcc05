"""`select_batch`: the selection of a pool, for training loops without a trainer."""

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from qtuning_kernels.config import QTuningConfig
from qtuning_kernels.data.batches import put_together, take_apart
from qtuning_kernels.data.samples import without_labels
from qtuning_kernels.models.causal_lm import CausalLM
from qtuning_kernels.pruning.policies import make_policy
from qtuning_kernels.training.planner import StepPlanner

_PLANNERS: WeakKeyDictionary[nn.Module, StepPlanner] = WeakKeyDictionary()


def select_batch(model: nn.Module, batch: Mapping[str, Any], config: QTuningConfig | None = None) -> dict[str, Any]:
    """The batch to train on: the kept samples of `batch`, labels −100 on their pruned tokens, padding cut off.

    Scores the batch with the model as it is now. What a loop divides its loss by should be the number of labels that
    are left, over all batches and processes of the optimiser step. With several processes the pools of all are one, as
    `QTuningConfig.selection_scope` says, and every process has to call this as often.

    Args:
        model: a `transformers` causal language model, a PEFT model around one, or what wraps it for training (DDP,
            FSDP2).
        batch: ``input_ids``, ``labels`` and ``attention_mask`` ``[B, L]``, or a padding-free row; see
            `data.batches.take_apart`.
        config: the settings; default `QTuningConfig()`.

    Returns:
        A batch of the same columns, on the same device; where no sample is eligible, one without labels.

    Raises:
        ValueError: an unsupported model, or a batch that cannot be divided by samples.
        FloatingPointError: every sample scored NaN.
    """
    config = QTuningConfig() if config is None else config
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    planner = _PLANNERS.get(inner)
    if planner is None or planner.config != config:
        if (policy := make_policy(config)).weighted:
            raise ValueError(f"policy {policy!r} weighs tokens; accepted: one that keeps or prunes, or QTuningTrainer")
        causal_lm = CausalLM(inner)
        causal_lm.check(inner)
        parameter = next(inner.parameters())
        sharded = hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_numel")
        planner = StepPlanner(inner, causal_lm, config, parameter.device, sharded=sharded)
        _PLANNERS[inner] = planner
    samples, kind = take_apart(batch)
    (kept,) = planner.plan([samples]).kept
    return put_together(kept or [without_labels(samples)], kind)
