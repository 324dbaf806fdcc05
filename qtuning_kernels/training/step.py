"""One optimiser step: score the pools, select, compact, and train on what is kept."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qtuning_kernels.config import QTuningConfig
from qtuning_kernels.data.micro_batches import MicroBatch, micro_batches
from qtuning_kernels.data.samples import Sample, cu_seqlens_of
from qtuning_kernels.kernels.contract import stats_dtype
from qtuning_kernels.kernels.linear import linear_cross_entropy
from qtuning_kernels.models.causal_lm import CausalLM, head_parameters
from qtuning_kernels.models.matmul import Precision, choose_precision, float32_matmul
from qtuning_kernels.models.scoring import Scorer, Scores, layout_for
from qtuning_kernels.training.accounting import Clock, Flops, Totals
from qtuning_kernels.training.distributed import gather, redistribute
from qtuning_kernels.training.score_cache import ScoreCache
from qtuning_kernels.training.selection import Selection, select


@dataclass
class StepPlan:
    """What one optimiser step trains on, and what was decided on the way.

    Attributes:
        batches: micro-batches of this process.
        num_kept: tokens in the loss, over all pools and processes of the step.
        pools: the samples of this process, pool by pool.
        scores, selections: per pool; empty where both ratios are 1 and nothing was scored.
        clock, totals: accounts of this step.
    """

    batches: list[MicroBatch]
    num_kept: int
    pools: list[list[Sample]]
    scores: list[Scores]
    selections: list[Selection]
    clock: Clock
    totals: Totals
    score_age: float = 0.0


class QTuningStep:
    """Plans and runs optimiser steps on a model.

    Args:
        model: what the forwards go through: the model itself, or what wraps it for training.
        causal_lm: its `CausalLM`.
        config: the settings.
        device: where the model is.
        autocast: makes the context manager of a forward, if the run computes under one.
        precision: how it multiplies; None: chosen here, the same in every process.
    """

    def __init__(
        self,
        model: nn.Module,
        causal_lm: CausalLM,
        config: QTuningConfig,
        device: torch.device,
        autocast: Any = nullcontext,
        precision: Precision | None = None,
    ) -> None:
        self.model, self.causal_lm, self.config = model, causal_lm, config
        self.device, self.autocast = device, autocast
        self.world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self.cache = ScoreCache(config.rescore_every)
        # scores need no gradient synchronisation, and a wrapper's forward may wait for the other processes
        inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        if precision is None:
            with autocast():
                casts = torch.is_autocast_enabled(device.type)
            chosen = choose_precision(
                causal_lm.base, matmul=config.matmul, score_dtype=config.score_dtype, autocast=casts
            )
            precision = gather(chosen)[0]
        self.precision = precision
        self.scorer = Scorer(inner, causal_lm, precision, batch_tokens=config.score_batch_tokens)
        self.flops = Flops(causal_lm)

    @property
    def selects(self) -> bool:
        """Whether there is anything to prune; with both ratios 1 nothing is scored."""
        return self.config.sample_ratio < 1 or self.config.token_ratio < 1

    def plan(self, pools: list[list[Sample]], epoch: float = 0.0) -> StepPlan:
        """Scores and selects the pools of one optimiser step and packs what is kept.

        Raises:
            FloatingPointError: every sample that has a trainable token scored NaN.
        """
        clock = Clock(self.device)
        samples = [sample for pool in pools for sample in pool]
        scores: list[Scores] = []
        selections: list[Selection] = []
        scored_before = self.scorer.tokens_scored
        age = 0.0
        if self.selects:
            with clock.phase("score"):
                all_scores, age = self.cache.score(samples, int(epoch), self._score)
                scores = _split(all_scores, pools)
                _refuse_nan(all_scores, samples)
            with clock.phase("select"):
                shared = self.world_size > 1 and self.config.selection_scope == "global"
                selections = [select(s, self.config, shared=shared) for s in scores]
        with clock.phase("compact"):
            if self.selects:
                kept = [
                    sample
                    for pool, selection in zip(pools, selections, strict=True)
                    for sample in selection.kept_samples(pool, self.config.token_mode)
                ]
            else:
                kept = [sample for sample in samples if len(sample.label_positions)]
            totals = self._account(pools, selections, kept, self.scorer.tokens_scored - scored_before)
            num_kept = totals.tokens_kept
            if self.selects and self.world_size > 1 and self.config.selection_scope == "global":
                kept = redistribute(kept)
            batches = micro_batches(kept, self.config.micro_batch_tokens, layout_for(self.causal_lm.base))
        return StepPlan(batches, num_kept, pools, scores, selections, clock, totals, age)

    def train(self, plan: StepPlan, backward: Any, no_sync: Any = nullcontext) -> Tensor:
        """Forward and backward over the plan's micro-batches.

        Args:
            plan: from `plan`, under the same weights.
            backward: called with each loss.
            no_sync: makes the context manager under which gradients stay local; every micro-batch but the
                last runs in it.

        Returns:
            0-d float32: mean nll of the tokens in the loss, over the whole step (times the processes' share:
            the mean over processes is the step's loss).
        """
        total = torch.zeros((), device=self.device)
        if plan.num_kept == 0:
            return total
        # data-parallel training averages gradients over processes, the loss is a mean over all their tokens
        weight = self.world_size / plan.num_kept
        # a process that has nothing left still has to take part in the others' synchronisation
        batches: Sequence[Any] = plan.batches or [_nothing()]
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with nullcontext() if last else no_sync(), float32_matmul(self.precision.matmul):
                with self.autocast():
                    loss = self._loss(batch, 0.0 if not plan.batches else weight)
                backward(loss)
            total += loss.detach()
        return total

    def _loss(self, batch: MicroBatch, weight: float) -> Tensor:
        batch = batch.to(self.device)

        def head_loss(hidden: Tensor) -> Tensor:
            matrix, bias = head_parameters(self.causal_lm.head)
            token_weight = torch.full(batch.labels.shape, weight, dtype=stats_dtype(matrix.dtype), device=self.device)
            hidden = hidden.flatten(0, 1)[batch.rows]
            return linear_cross_entropy(
                hidden, matrix, batch.labels, bias=bias, token_weight=token_weight, **self.causal_lm.scaling()
            )

        return self.causal_lm.forward(self.model, batch.input_ids, batch.position_ids, head_loss)

    def loss(self, samples: Sequence[Sample]) -> Tensor:
        """Mean nll over the trainable tokens of `samples`, whole; the loss of an evaluation batch."""
        total = sum(len(sample.label_positions) for sample in samples)
        batches = micro_batches(samples, self.config.micro_batch_tokens, layout_for(self.causal_lm.base))
        zero = torch.zeros((), device=self.device)
        with self.autocast(), float32_matmul(self.precision.matmul):
            return sum((self._loss(batch, 1 / total) for batch in batches), zero)

    def _score(self, samples: Sequence[Sample]) -> Scores:
        return self.scorer.score(samples, self.device, self.autocast)

    def _account(
        self,
        pools: list[list[Sample]],
        selections: list[Selection],
        kept: list[Sample],
        positions_scored: int,
    ) -> Totals:
        """The step's counts, over all processes."""
        samples = [sample for pool in pools for sample in pool]
        totals = Totals(steps=1, samples_seen=len(samples), tokens_scored=positions_scored)
        totals.tokens_seen = sum(len(s.label_positions) for s in samples)
        totals.samples_kept = len(kept)
        totals.tokens_kept = sum(len(s.label_positions) for s in kept)
        for selection in selections:
            triage = selection.triage
            finite = selection.plane.ppl.isfinite() & selection.plane.entropy.isfinite()
            totals.ineligible += int((~finite).sum())
            totals.supplemented += int(triage.supplemented.sum())
            for quadrant in range(5):
                inside = triage.quadrant == quadrant
                totals.quadrant[str(quadrant)] += int(inside.sum())
                totals.kept_by_quadrant[str(quadrant)] += int((inside & triage.keep).sum())
        whole = sum(len(s.trimmed().input_ids) for s in samples)
        trained = sum(len(s.trimmed().input_ids) for s in kept)
        totals.flops_full = self.flops.train(whole, totals.tokens_seen)
        totals.flops_spent = self.flops.train(trained, totals.tokens_kept)
        rows = totals.tokens_seen if positions_scored else 0
        totals.flops_spent += self.flops.forward(positions_scored, rows)
        everywhere = Totals()
        for part in gather(totals):
            everywhere.add(part)
        everywhere.steps, everywhere.empty_steps = 1, int(everywhere.tokens_kept == 0)
        return everywhere


def _nothing() -> MicroBatch:
    """One token that counts 0: a loss of 0 that is connected to every parameter."""
    zero = torch.zeros(1, dtype=torch.int64)
    return MicroBatch(zero.view(1, 1), None, zero, zero, zero)


def _split(scores: Scores, pools: list[list[Sample]]) -> list[Scores]:
    """The scores of each pool."""
    parts, start = [], 0
    for pool in pools:
        cu_seqlens = cu_seqlens_of(pool)
        end = start + int(cu_seqlens[-1])
        on_device = cu_seqlens.to(scores.nll.device)
        parts.append(Scores(scores.nll[start:end], scores.entropy[start:end], on_device))
        start = end
    return parts


def _refuse_nan(scores: Scores, samples: Sequence[Sample]) -> None:
    """NaN everywhere is a broken model; NaN in some samples makes those ineligible (decision d)."""
    starts = scores.cu_seqlens.tolist()
    nan = torch.isnan(scores.nll) | torch.isnan(scores.entropy)
    counts = torch.cat([nan.new_zeros(1, dtype=torch.int64), nan.long().cumsum(0)]).tolist()
    having = [i for i in range(len(samples)) if starts[i + 1] > starts[i]]
    bad = [i for i in having if counts[starts[i + 1]] > counts[starts[i]]]
    if having and len(bad) == len(having):
        raise FloatingPointError(
            f"the model gives NaN for every sample of the pool, the first is {samples[bad[0]].sample_id}: "
            "its weights or activations are not finite, and no step would mend that. "
            "Check the checkpoint, the learning rate and the precision."
        )
