"""One optimiser step: score the pools, select, compact, and train on what is kept."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qtuning_kernels.config import QTuningConfig
from qtuning_kernels.data.samples import MicroBatch, Sample, cu_seqlens_of, micro_batches
from qtuning_kernels.kernels.contract import stats_dtype
from qtuning_kernels.kernels.linear import linear_cross_entropy, linear_token_stats
from qtuning_kernels.models.causal_lm import CausalLM, head_parameters
from qtuning_kernels.models.scoring import Scorer, Scores, layout_for, resolve_score_dtype
from qtuning_kernels.training.accounting import Clock, Flops, Totals
from qtuning_kernels.training.score_cache import ScoreCache
from qtuning_kernels.training.selection import Selection, exchange, gather, select


@dataclass
class Group:
    """A scored forward whose graph is kept (`step="reuse"`)."""

    hidden: Tensor  # [n, H], the rows that predict
    labels: Tensor  # [n]
    slots: Tensor  # [n]


@dataclass
class StepPlan:
    """What one optimiser step trains on, and what was decided on the way.

    Attributes:
        batches: micro-batches of this process, or the groups whose graphs are kept.
        keep: with groups, bool ``[T]``, the tokens in the loss; else None (the batches hold only those).
        num_kept: tokens in the loss, over all pools and processes of the step.
        pools: the samples of this process, pool by pool.
        scores, selections: per pool; empty where both ratios are 1 and nothing was scored.
        clock, totals: accounts of this step.
    """

    batches: list[MicroBatch] | list[Group]
    keep: Tensor | None
    num_kept: int
    pools: list[list[Sample]]
    scores: list[Scores]
    selections: list[Selection]
    clock: Clock
    totals: Totals
    score_age: float = 0.0


def dropout_of(model: nn.Module) -> float:
    """The largest dropout probability in the model: 0 means that training and evaluation mode agree."""
    modules = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    config = model.config.get_text_config()
    settings = [getattr(config, name, None) or 0.0 for name in ("attention_dropout", "attn_pdrop")]
    return max([0.0, *modules, *settings])


def resolve_step(config: QTuningConfig, base: nn.Module, world_size: int) -> str:
    """``"rescore"`` or ``"reuse"`` for ``step="auto"``; refuses a ``"reuse"`` that would not be exact.

    With F one forward of the pool and r the sample ratio, full fine-tuning costs ``s·F + 3rF`` to rescore,
    where s < 1 is what a cheaper scoring precision saves, and ``F + 2F`` to reuse when every group of the
    scoring forward holds a kept sample, which is usual. LoRA trains without weight gradients: ``s·F + 2rF``
    against ``F + F``. So reuse is chosen if it is exact, scoring has the training precision, and r is over
    2/3 (over 1/2 where most weights are frozen).
    """
    obstacles = []
    if (dropout := dropout_of(base)) > 0:
        obstacles.append(f"the model has dropout {dropout}, so a training forward gives random scores")
    if world_size > 1:
        obstacles.append(f"it runs in one process, here are {world_size}")
    if config.step == "reuse":
        if obstacles:
            raise ValueError(f"step='reuse' is not possible: {'; '.join(obstacles)}. Use step='rescore'.")
        return "reuse"
    if config.step == "rescore" or obstacles or config.token_mode == "drop" or config.rescore_every > 1:
        return "rescore"
    if resolve_score_dtype(config.score_dtype, base) is not None:
        return "rescore"
    parameters = list(base.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    frozen = trained < sum(p.numel() for p in parameters) / 2
    return "reuse" if config.sample_ratio > (1 / 2 if frozen else 2 / 3) else "rescore"


class QTuningStep:
    """Plans and runs optimiser steps on a model.

    Args:
        model: what the forwards go through: the model itself, or what wraps it for training.
        parts: its `CausalLM`.
        config: the settings.
        device: where the model is.
        autocast: makes the context manager of a forward, if the run computes under one.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: CausalLM,
        config: QTuningConfig,
        device: torch.device,
        autocast: Any = nullcontext,
    ) -> None:
        self.model, self.parts, self.config = model, parts, config
        self.device, self.autocast = device, autocast
        self.world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self.strategy = resolve_step(config, parts.base, self.world_size)
        self.cache = ScoreCache(config.rescore_every)
        # scores need no gradient synchronisation, and a wrapper's forward may wait for the other processes
        inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self.scorer = Scorer(inner, parts, score_dtype=config.score_dtype, batch_tokens=config.score_batch_tokens)
        self.flops = Flops(parts)

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
        groups: list[Group] = []
        scores: list[Scores] = []
        selections: list[Selection] = []
        scored_before = self.scorer.tokens_scored
        age = 0.0
        if self.selects:
            with clock.phase("score"):
                if self.strategy == "reuse":
                    groups, all_scores = self._forward_with_graph(samples)
                else:
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
                kept = [sample for sample in samples if len(sample.targets)]
            totals = self._account(pools, selections, kept, self.scorer.tokens_scored - scored_before)
            num_kept = totals.tokens_kept
            keep = None
            if groups:
                keep = torch.cat([s.token_mask for s in selections]).to(self.device)
                batches = [group for group in groups if bool(keep[group.slots].any())]
            else:
                if self.selects and self.world_size > 1 and self.config.selection_scope == "global":
                    kept = exchange(kept)
                batches = micro_batches(kept, self.config.micro_batch_tokens, layout_for(self.parts.base))
        return StepPlan(batches, keep, num_kept, pools, scores, selections, clock, totals, age)

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
            with nullcontext() if last else no_sync():
                with self.autocast():
                    loss = self._loss(batch, plan, 0.0 if not plan.batches else weight)
                backward(loss)
            total += loss.detach()
        return total

    def _loss(self, batch: MicroBatch | Group, plan: StepPlan, weight: float) -> Tensor:
        def head_loss(hidden: Tensor, keep: Tensor) -> Tensor:
            matrix, bias = head_parameters(self.parts.head)
            return linear_cross_entropy(
                hidden,
                matrix,
                batch.labels,
                bias=bias,
                token_weight=keep.to(stats_dtype(matrix.dtype)) * weight,
                **self.parts.scaling(),
            )

        if isinstance(batch, Group):
            return head_loss(batch.hidden, plan.keep[batch.slots])
        batch = batch.to(self.device)
        return self.parts.forward(
            self.model,
            batch.input_ids,
            batch.position_ids,
            lambda hidden: head_loss(hidden.flatten(0, 1)[batch.rows], torch.ones_like(batch.labels)),
        )

    def loss(self, samples: Sequence[Sample]) -> Tensor:
        """Mean nll over the trainable tokens of `samples`, whole; the loss of an evaluation batch."""
        total = sum(len(sample.targets) for sample in samples)
        plan = StepPlan([], None, total, [], [], [], Clock(self.device), Totals())
        batches = micro_batches(samples, self.config.micro_batch_tokens, layout_for(self.parts.base))
        zero = torch.zeros((), device=self.device)
        with self.autocast():
            return sum((self._loss(batch, plan, 1 / total) for batch in batches), zero)

    def _score(self, samples: Sequence[Sample]) -> Scores:
        return self.scorer.score(samples, self.device, self.autocast)

    def _forward_with_graph(self, samples: Sequence[Sample]) -> tuple[list[Group], Scores]:
        """One training forward of the pool, its scores, and the graphs to go back through."""
        cu_seqlens = cu_seqlens_of(samples).to(self.device)
        stats = torch.zeros(2, int(cu_seqlens[-1]), device=self.device)
        groups = []
        self.parts.base.train()
        for batch in micro_batches(samples, self.config.micro_batch_tokens, layout_for(self.parts.base)):
            self.scorer.tokens_scored += batch.input_ids.numel()
            batch = batch.to(self.device)
            with self.autocast():
                hidden = self.parts.forward(
                    self.model,
                    batch.input_ids,
                    batch.position_ids,
                    lambda hidden, rows=batch.rows: hidden.flatten(0, 1)[rows],
                )
                weight, bias = head_parameters(self.parts.head)
                with torch.no_grad():
                    result = linear_token_stats(
                        hidden.detach(), weight, batch.labels, bias=bias, **self.parts.scaling()
                    )
            stats[0, batch.slots], stats[1, batch.slots] = (
                result.nll.to(stats.dtype),
                result.entropy.to(stats.dtype),
            )
            groups.append(Group(hidden, batch.labels, batch.slots))
        return groups, Scores(stats[0], stats[1], cu_seqlens)

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
        totals.tokens_seen = sum(len(s.targets) for s in samples)
        totals.samples_kept = len(kept)
        totals.tokens_kept = sum(len(s.targets) for s in kept)
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
        if self.strategy == "reuse" and selections:
            extra = self.flops.train(trained, totals.tokens_kept) - self.flops.forward(trained, 0)
            totals.flops_spent = self.flops.forward(whole, totals.tokens_seen) + extra
        else:
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
