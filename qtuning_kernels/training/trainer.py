"""`QTuningTrainer`: Hugging Face's `Trainer` on what Q-Tuning keeps, with the fused loss."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from qtuning_kernels.config import QTuningConfig
from qtuning_kernels.data.batches import take_apart
from qtuning_kernels.data.collator import PoolCollator
from qtuning_kernels.data.micro_batches import MicroBatch, micro_batches, nothing
from qtuning_kernels.data.samples import Sample
from qtuning_kernels.kernels.contract import stats_dtype
from qtuning_kernels.kernels.linear import linear_cross_entropy, linear_token_stats
from qtuning_kernels.models.causal_lm import evaluation
from qtuning_kernels.models.collectives import largest
from qtuning_kernels.models.matmul import float32_matmul
from qtuning_kernels.models.scoring import choose_layout
from qtuning_kernels.pruning.policies import Policy
from qtuning_kernels.training.mixin import QTuningMixin
from qtuning_kernels.training.planner import StepPlanner

PROBE = [[1, 2, 3, 4, 5], [5, 3, 4, 2, 1]]  # token ids, modulo the vocabulary
logger = logging.get_logger(__name__)


class QTuningTrainer(QTuningMixin, Trainer):
    """A `transformers.Trainer` that trains each step on what Q-Tuning keeps of its batch.

    The batch of the dataloader, ``per_device_train_batch_size`` samples, is the selection pool. Everything else
    (schedulers, checkpoints, resuming, callbacks, mixed precision, sharding, clipping, logging) is `Trainer`'s own.
    The loss is the sum of nll over the kept tokens, divided by their number in the whole optimiser step, over all pools
    and processes; it is computed on the kept positions alone, in micro-batches under ``micro_batch_tokens``, where that
    equals the model's own loss. The model is asked once; where it adds to its loss (router losses, regularisers of
    adapters), or the loss is another (label smoothing, ``compute_loss_func``, a compiled model), the host's is taken.

    Args:
        model: a decoder-only causal language model of `transformers`, or a PEFT model around one.
        args: `transformers.TrainingArguments`.
        data_collator: default `PoolCollator`; any will do whose batches `data.batches.take_apart` understands.
        train_dataset: samples with ``input_ids``, ``labels`` (−100 outside the answer) and, if they have one, a stable
            ``sample_id``.
        eval_dataset, processing_class: as in `Trainer`.
        qtuning: the settings; default `QTuningConfig()`.
        **kwargs: further arguments of `Trainer`.

    Raises:
        ValueError: as `QTuningMixin`.
    """

    takes_weights = True

    def __init__(
        self,
        model: nn.Module | None = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        qtuning: QTuningConfig | None = None,
        **kwargs: Any,
    ) -> None:
        pad = getattr(processing_class, "pad_token_id", None)
        super().__init__(
            model,
            args,
            PoolCollator(pad or 0) if data_collator is None else data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            qtuning=qtuning,
            **kwargs,
        )
        self._fused: bool | None = None
        weighs_loss = type(self.policy).loss_weight is not Policy.loss_weight
        self._loss_weight = self.policy.loss_weight if weighs_loss else None

    def _begin(self) -> StepPlanner:
        self._fused = None
        return super()._begin()

    def fused(self) -> bool:
        """Whether the loss on kept positions is the model's own loss, asked of it once a run."""
        if self._fused is None:
            replaced = {
                "label_smoothing_factor": self.label_smoother is not None,
                "compute_loss_func": self.compute_loss_func is not None,
                "torch_compile": self.args.torch_compile,
            }
            reasons = [name for name, there in replaced.items() if there]
            if not reasons and not self._loss_is_the_models():
                reasons = ["the model adds to its loss"]
            self._fused = not reasons
            if reasons and self.policy.weighted:
                raise ValueError(
                    f"policy {self.policy!r} weighs tokens, and the loss is the host's, which takes no weights "
                    f"({', '.join(reasons)}); accepted: a policy that keeps or prunes"
                )
            if reasons:
                logger.warning(f"the loss is the host's, not the fused one: {', '.join(reasons)}")
            else:
                self.model_accepts_loss_kwargs = True  # the labels of a step are counted: the fused loss needs that
        return self._fused

    @torch.no_grad()
    def _loss_is_the_models(self) -> bool:
        vocabulary = self.causal_lm.base.config.get_text_config().vocab_size
        input_ids = (torch.tensor(PROBE) % vocabulary).to(self.args.device)
        with evaluation(self.model), self.compute_loss_context_manager():
            own = self.model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), labels=input_ids).loss
            samples, _ = take_apart({"input_ids": input_ids, "labels": input_ids})
            (batch,) = micro_batches(samples, input_ids.numel())
            ours = self._loss(self.model, batch.to(self.args.device), len(batch.labels))
        # the model's own loss may come from rounded logits, as ours does
        return torch.allclose(own.float(), ours.float(), rtol=1e-3)

    def _loss(
        self,
        model: nn.Module,
        batch: MicroBatch,
        count: Tensor | int,
        factor: int = 1,
        loss_weight: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """Σ weight·nll of the micro-batch's labels, times `factor`, over `count`; weights come with the batch or are
        made of its own statistics."""

        def head_loss(hidden: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
            options = {"bias": bias, **self.causal_lm.scaling()}
            if loss_weight is not None:
                stats = linear_token_stats(hidden, matrix, batch.labels, **options)
                weight = loss_weight(stats.nll.detach(), stats.entropy.detach())
                return (weight * stats.nll).sum() * factor / count
            if hidden.device.type != "cpu":  # weights would be read on the host
                loss = linear_cross_entropy(hidden, matrix, batch.labels, token_weight=batch.weights, **options)
                return loss * factor / count
            weight = torch.full(batch.labels.shape, factor, dtype=stats_dtype(matrix.dtype)) / count
            weight = weight if batch.weights is None else weight * batch.weights
            return linear_cross_entropy(hidden, matrix, batch.labels, token_weight=weight, **options)

        return self.causal_lm.forward(model, batch.input_ids, batch.position_ids, batch.rows, head_loss)

    def get_batch_samples(self, *args: Any) -> tuple[list, Tensor | int | None]:
        if self._planner is None:
            self._begin()
        self.fused()
        return super().get_batch_samples(*args)

    def _step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The host's step on each micro-batch of the kept samples; gradients are exchanged in the last."""
        if not self.fused():
            return super()._step(model, inputs, num_items_in_batch)
        samples, _ = take_apart(inputs)
        batches = self._micro_batches(samples) or [nothing()]
        state = self.accelerator.gradient_state
        synchronises = state.sync_gradients
        total = torch.zeros((), device=self.args.device)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            state._set_sync_gradients(synchronises and last)  # DeepSpeed steps where this is set
            # a pool before the last is within such a context already, and FSDP2 would synchronise as this one ends
            defers = synchronises and not last and not self.is_deepspeed_enabled
            with self.accelerator.no_sync(model) if defers else nullcontext():
                total += super()._step(model, batch.to(self.args.device)._asdict(), num_items_in_batch)
        return total

    def _micro_batches(self, samples: list[Sample]) -> list[MicroBatch]:
        """As many in every process where parameters are gathered in the forwards."""
        layout = self._planner.scorer.layout if self._planner else choose_layout(self.causal_lm, self.sharded)
        batches = micro_batches(samples, self.qtuning.micro_batch_tokens, layout)
        return batches + [nothing()] * (largest(len(batches)) - len(batches) if self.sharded else 0)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The fused loss of a micro-batch of `training_step`; of any other batch the host's."""
        if "rows" not in inputs:
            inputs = {name: value for name, value in inputs.items() if name != "sample_id"}
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if num_items_in_batch is None:
            raise ValueError("num_items_in_batch is None; accepted: the number of labels in the optimiser step")
        # data-parallel training averages gradients over processes, the loss is a mean over all their tokens
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return self._loss(model, MicroBatch(**inputs), num_items_in_batch, processes, self._loss_weight)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """Evaluation's loss without logits, where nothing but the loss is asked for: mean nll, nothing pruned."""
        host = partial(super().prediction_step, model, inputs, prediction_loss_only, ignore_keys)
        if not prediction_loss_only or inputs.get("labels") is None or not self.fused():
            return host()
        samples, _ = take_apart(inputs)
        count = sum(len(sample.labels) for sample in samples)
        if count == 0:
            return host()
        batches = self._micro_batches(samples)
        matmul = self._planner.precision.matmul if self._planner else "default"
        with torch.no_grad(), self.compute_loss_context_manager(), float32_matmul(matmul):
            losses = [self._loss(model, batch.to(self.args.device), count) for batch in batches]
        return torch.stack(losses).sum(), None, None
