"""What an optimiser step trains on: its pools scored, selected, cut and dealt out again."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qtuning_kernels.config import QTuningConfig
from qtuning_kernels.data.samples import Sample, cu_seqlens_of
from qtuning_kernels.models.causal_lm import CausalLM
from qtuning_kernels.models.collectives import gather, world_size
from qtuning_kernels.models.matmul import Precision, choose_precision
from qtuning_kernels.models.scoring import Scorer, Scores
from qtuning_kernels.pruning.policies import Policy, PoolStats, make_policy
from qtuning_kernels.pruning.policies.protocol import SCORED
from qtuning_kernels.training.accounting import Clock, Flops, Totals
from qtuning_kernels.training.distributed import redistribute
from qtuning_kernels.training.reference import ReferenceScores
from qtuning_kernels.training.score_cache import ScoreCache
from qtuning_kernels.training.selection import Selection, select


@dataclass
class StepPlan:
    """What one optimiser step trains on, and what was decided on the way.

    Attributes:
        kept: what this process trains on, pool by pool: samples whose label positions are the tokens in the loss.
        pools: the samples of this process, pool by pool.
        scores, selections: per pool; scores are empty where nothing was scored, selections where all is kept.
        clock, totals: accounts of this step, and of this process until it ends.
        score_age: mean age of the scores, in epochs.
    """

    kept: list[list[Sample]]
    pools: list[list[Sample]]
    scores: list[Scores]
    selections: list[Selection]
    clock: Clock
    totals: Totals
    score_age: float = 0.0
    loss: Tensor | float = 0.0  # of this process, summed over micro-batches


class StepPlanner:
    """Plans optimiser steps on a model.

    Args:
        model: what scoring forwards go through.
        causal_lm: its `CausalLM`.
        config: the settings.
        device: where the model is.
        autocast: makes the context manager of a forward, if the run computes under one.
        precision: how scoring multiplies; None: chosen here, the same in every process.
        sharded: every process makes the same number of forwards, since parameters are gathered in them.
        policy: what decides; None: what the settings name.
        seed: of what policies draw.
        reference: gives the nll of a reference model, `ReferenceScores`.
    """

    def __init__(
        self,
        model: nn.Module,
        causal_lm: CausalLM,
        config: QTuningConfig,
        device: torch.device,
        autocast: Any = nullcontext,
        precision: Precision | None = None,
        sharded: bool = False,
        policy: Policy | None = None,
        seed: int = 0,
        reference: ReferenceScores | None = None,
    ) -> None:
        self.policy = make_policy(config) if policy is None else policy
        self.seed, self.reference = seed, reference
        self._calls = 0
        if "reference_nll" in self.policy.needs and reference is None:
            raise ValueError(
                f"policy {self.policy!r} needs the nll of a reference model; accepted: reference_model or reference_nll"
            )
        self.causal_lm, self.config, self.device, self.autocast = causal_lm, config, device, autocast
        self.world_size = world_size()
        if precision is None:
            with autocast():
                casts = torch.is_autocast_enabled(device.type)
            precision = choose_precision(
                causal_lm.base, matmul=config.matmul, score_dtype=config.score_dtype, autocast=casts
            )
            precision = gather(precision)[0]
        self.precision = precision
        self.cache = ScoreCache(config.rescore_every, always_score=sharded)
        with autocast():
            self.scorer = Scorer(model, causal_lm, precision, batch_tokens=config.score_batch_tokens, sharded=sharded)
        self.flops = Flops(causal_lm)

    @property
    def selects(self) -> bool:
        """Whether the policy ever keeps less than all."""
        return self.policy.of_pool

    def plan(
        self, pools: list[list[Sample]], epoch: float = 0.0, step: int | None = None, total_steps: int | None = None
    ) -> StepPlan:
        """Scores and selects the pools of one optimiser step.

        Args:
            pools: one per batch of the step.
            epoch, step: passed before this one; by default as often as this was called.
            total_steps: of the run, if known.

        Raises:
            FloatingPointError: every sample that has a trainable token scored NaN.
        """
        step = self._calls if step is None else step
        self._calls += 1
        clock = Clock(self.device)
        samples = [sample for pool in pools for sample in pool]
        scores: list[Scores] = []
        selections: list[Selection] = []
        scored_before = self.scorer.tokens_scored
        age = 0.0
        if self.selects:
            with clock.phase("score"):
                if self.policy.needs & SCORED:
                    all_scores, age = self.cache.score(samples, int(epoch), self._score)
                    scores = _split(all_scores, pools)
                    refuse_nan(all_scores, [sample.sample_id for sample in samples])
                stats = [self._pool_stats(i, pool, scores, step, total_steps) for i, pool in enumerate(pools)]
            with clock.phase("select"):
                shared = self.world_size > 1 and self.config.selection_scope == "global"
                selections = select(stats, self.policy, shared=shared)
        with clock.phase("compact"):
            if self.selects:
                pairs = zip(pools, selections, strict=True)
                kept = [selection.kept_samples(pool, self.config.token_mode) for pool, selection in pairs]
            else:
                kept = [[sample for sample in pool if len(sample.label_positions)] for pool in pools]
            flat = [sample for pool in kept for sample in pool]
            totals = self._account(pools, selections, flat, self.scorer.tokens_scored - scored_before)
            if self.selects and self.world_size > 1 and self.config.selection_scope == "global":
                kept = redistribute(kept)
        return StepPlan(kept, pools, scores, selections, clock, totals, age)

    def _score(self, samples: Sequence[Sample]) -> Scores:
        return self.scorer.score(samples, self.device, self.autocast).cpu()

    def _pool_stats(
        self, index: int, pool: list[Sample], scores: list[Scores], step: int, total_steps: int | None
    ) -> PoolStats:
        needs = self.policy.needs
        generator = torch.Generator().manual_seed((self.seed << 32) + (step << 8) + index)
        stats = PoolStats(cu_seqlens_of(pool), [s.sample_id for s in pool], step, total_steps, generator)
        given: dict[str, Any] = scores[index]._asdict() if scores else {}
        if "first_nll" in needs:
            given["first_nll"] = self.cache.first_nll(pool, stats.mean(given["nll"]))
        if "reference_nll" in needs and self.reference:
            given["reference_nll"] = self.reference.nll(pool)
        return replace(stats, **{name: given[name] for name in needs})

    def _account(
        self,
        pools: list[list[Sample]],
        selections: list[Selection],
        kept: list[Sample],
        positions_scored: int,
    ) -> Totals:
        """The step's counts, of this process."""
        samples = [sample for pool in pools for sample in pool]
        totals = Totals(samples_seen=len(samples), tokens_scored=positions_scored)
        totals.tokens_seen = sum(len(s.label_positions) for s in samples)
        totals.samples_kept = len(kept)
        totals.tokens_kept = sum(len(s.label_positions) for s in kept)
        for selection in selections:
            plane, triage = selection.plane, selection.triage
            if plane is None or triage is None:
                continue
            totals.ineligible += int((~(plane.ppl.isfinite() & plane.entropy.isfinite())).sum())
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
        return totals


def _split(scores: Scores, pools: list[list[Sample]]) -> list[Scores]:
    """The scores of each pool."""
    parts, start = [], 0
    for pool in pools:
        cu_seqlens = cu_seqlens_of(pool)
        end = start + int(cu_seqlens[-1])
        nll, entropy, lse = (x[start:end] for x in scores[:3])
        parts.append(Scores(nll, entropy, lse, cu_seqlens))
        start = end
    return parts


def refuse_nan(scores: Scores, sample_ids: Sequence[int | str]) -> None:
    """NaN everywhere is a broken model; NaN in some samples makes those ineligible (decision d)."""
    starts = scores.cu_seqlens.tolist()
    nan = torch.isnan(scores.nll) | torch.isnan(scores.entropy)
    counts = torch.cat([nan.new_zeros(1, dtype=torch.int64), nan.long().cumsum(0)]).tolist()
    having = [i for i in range(len(sample_ids)) if starts[i + 1] > starts[i]]
    bad = [i for i in having if counts[starts[i + 1]] > counts[starts[i]]]
    if having and len(bad) == len(having):
        raise FloatingPointError(
            f"the model gives NaN for every sample of the pool, the first is {sample_ids[bad[0]]}: "
            "its weights or activations are not finite, and no step would mend that. "
            "Check the checkpoint, the learning rate and the precision."
        )
